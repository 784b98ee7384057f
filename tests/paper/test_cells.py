"""``cells.json`` names what to count for every printed number; tables and plots hold just that."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import ATTACKS, COUNTS, files, history, params, put, records, recount, rows, stated, write


def test_every_cell_can_be_recomputed_from_the_verdicts_it_names(tmp_path: Path) -> None:
    for method in ("pgd_at", "dynat"):
        for seed in (0, 1):
            write(
                tmp_path,
                method,
                {k: v - 3 * seed for k, v in COUNTS.items()},
                seed=seed,
                last=5,
                aa={40: 27, 80: 50},
            )
    cells = json.loads(files(params(["pgd_at"], ["dynat"], (0, 1)), tmp_path)["metrics/tables/cells.json"])
    assert len(cells) == 2 * 3 * (
        len(ATTACKS) * 2 + 2 + 1
    )  # methods; seeds and their mean; best, last; AA; All
    for key, cell in cells.items():
        by_seed: dict[int, list[float]] = {}
        for source in cell["sources"]:
            seed, value = recount(tmp_path, source)
            by_seed.setdefault(seed, []).append(value)
            pointed: object = json.loads((tmp_path / source["file"]).read_text())
            for part in source["pointer"].strip("/").split("/"):
                pointed = pointed[part]  # type: ignore[index]
            assert pointed == pytest.approx(value, abs=1e-4), key
        means = [statistics.mean(values) for values in by_seed.values()]
        assert cell["text"].startswith(f"{statistics.mean(means):.2f}"), key
        assert cell["numbers"]["accuracy"] == f"{statistics.mean(means):.2f}"
        if "/mean/" in key:
            assert len(by_seed) == 2
            assert cell["text"].endswith(f" ± {statistics.stdev(means):.2f}")
    assert [s["attack"] for s in cells["toy/dynat/0/all"]["sources"]] == [
        "pgd10",
        "pgd20",
        "pgd50",
        "cw",
        "square",
    ]
    assert cells["toy/dynat/0/all"]["rule"] == "average of attacks"
    assert cells["toy/dynat/0/aa"]["sources"][0]["pointer"] == "/aa/n40/accuracy"
    assert cells["toy/dynat/0/aa-n80"]["sources"][0]["n"] == 80
    assert cells["toy/dynat/1/last-pgd20"]["sources"][0]["checkpoint"] == "last"


def test_tables_print_the_cells_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, last=5, aa={40: 27})
    found = files(params(["pgd_at"], ["dynat"]), tmp_path)
    cells = json.loads(found["metrics/tables/cells.json"])
    text = found["metrics/tables/toy.md"]
    numbers = [
        v for t in (0, 1) for row in rows(text, t).values() for v in row.values() if re.match(r"\d+\.", v)
    ]
    here = [cell["text"] for cell in cells.values() if "metrics/tables/toy.md" in cell["tables"]]
    assert sorted(numbers) == sorted(here)
    lines = {row["cell"]: row for row in records(found["metrics/tables/toy.csv"]) if row["cell"]}
    assert set(lines) == {key for key, cell in cells.items() if "metrics/tables/toy.csv" in cell["tables"]}
    for key, row in lines.items():
        assert {name: row[name] for name in cells[key]["numbers"]} == cells[key]["numbers"]
    assert lines["toy/pgd_at/0/pgd20"]["epsilon"] == "8/255"
    assert (lines["toy/pgd_at/0/pgd20"]["low"], lines["toy/pgd_at/0/pgd20"]["high"]) == tuple(
        f"{stated(74, 100)[bound]:.2f}" for bound in ("low", "high")
    )


def test_plots_hold_every_epoch_and_accuracy(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, "pgd_at", COUNTS, seed=seed)
        history(tmp_path, "pgd_at", seed)
    curve = {"checks": {}, "epsilon_curve": [[0, 97.0], [0.1, 40.5]], "model_sha256": "pgd_at-0"}
    put(tmp_path / "metrics/sanity/toy/pgd_at/0.json", curve)
    found = files(params(["pgd_at"], [], (0, 1)), tmp_path)
    training = records(found["metrics/plots/training.csv"])
    assert [(r["seed"], r["epoch"], r["test_clean"]) for r in training] == [
        (str(seed), str(epoch), str(48 + 9 * epoch)) for seed in (0, 1) for epoch in range(3)
    ]
    accuracies = {
        (r["seed"], r["attack"]): r["accuracy"] for r in records(found["metrics/plots/accuracy.csv"])
    }
    assert accuracies["1", "cw"] == accuracies["mean", "cw"] == "71.00"
    assert [r["accuracy"] for r in records(found["metrics/plots/epsilon.csv"])] == ["97", "40.5"]


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


def test_tabulating_twice_gives_the_same_bytes_and_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27})
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import hashlib, synthetic\n"
        "from dynat.paper.tabulation import tabulate, text_files\n"
        "files = text_files(tabulate(synthetic.params(['pgd_at'], ['dynat']), Path(sys.argv[1])))\n"
        "assert 'torch' not in sys.modules\n"
        "print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parents[1])]
    first, second = (
        subprocess.run(
            command, check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
