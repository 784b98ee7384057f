"""The files of a tabulation: series of the plots, what DVC compares."""

import json
from pathlib import Path

import yaml
from synthetic import COUNTS, files, history, params, put, records, rows, write

DVC = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())


def test_plots_hold_every_epoch_and_radius_and_no_file_that_no_plot_reads(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, "pgd_at", COUNTS, seed=seed)
        history(tmp_path, "pgd_at", seed)
    curve = {"checks": {}, "epsilon_curve": [[0, 97.0], [0.1, 40.5]], "n": 100, "model_sha256": "pgd_at-0"}
    put(tmp_path / "metrics/sanity/toy/pgd_at/0.json", curve)
    found = files(params(["pgd_at"], [], (0, 1)), tmp_path)
    training = records(found["metrics/plots/training.csv"])
    assert [(r["seed"], r["epoch"], r["test_clean"]) for r in training] == [
        (str(seed), str(epoch), str(48 + 9 * epoch)) for seed in (0, 1) for epoch in range(3)
    ]
    assert [r["accuracy"] for r in records(found["metrics/plots/epsilon.csv"])] == ["97", "40.5"]
    drawn = {source for plot in DVC["plots"] for each in plot.values() for source in each["y"]}
    assert {name for name in found if name.startswith("metrics/plots/")} == drawn


def test_dvc_compares_four_numbers_of_each_method_over_the_seeds_that_were_run(tmp_path: Path) -> None:
    for seed, less in ((0, 0), (1, 4)):
        write(tmp_path, "pgd_at", {k: v - less for k, v in COUNTS.items()}, seed=seed, aa={40: 27})
    found = files(params(["pgd_at", "trades"], [], (0, 1)), tmp_path)
    names = [name for name in found if name.startswith("metrics/tables/summary/")]
    assert names == ["metrics/tables/summary/toy/pgd_at.json"]  # nothing of trades was run
    assert json.loads(found[names[0]]) == {
        "clean": COUNTS["clean"] - 2,
        "pgd20": COUNTS["pgd20"] - 2,
        "cw": COUNTS["cw"] - 2,
        "aa": 67.5,
    }


def test_nothing_run_at_all_still_gives_every_table(tmp_path: Path) -> None:
    found = files(params(["pgd_at"], ["dynat"]), tmp_path)
    assert list(rows(found["metrics/tables/toy.md"])) == ["pgd_at", "dynat"]
    assert json.loads(found["metrics/tables/cells.json"]) == {}
    assert found["metrics/plots/training.csv"].startswith("setting,method,seed,epoch,")
