"""Pairs of methods: counted from the verdict files by hand, and printed in tables, a CSV and the report."""

import itertools
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from synthetic import COUNTS, binary, files, hexadecimal, params, put, raised, records, rows, stated, write

from dynat.evaluation.verdicts import wilson
from dynat.paper.measurements import read_results
from dynat.paper.pairs import compared, judged

METHODS = ["pgd_at", "trades", "dynat"]


def scatter(root: Path, method: str, seed: int, shift: int) -> None:
    """Verdicts of stage attack that are no prefixes: each image is robust with a chance of its own."""
    folder = root / f"metrics/attack/toy/{method}"
    metrics = json.loads((folder / f"{seed}.json").read_text())
    verdicts = json.loads((folder / f"{seed}.verdicts.json").read_text())
    draw = random.Random(f"{method}{seed}")
    for checkpoint, block in verdicts.items():
        for name, each in block.items():
            flags = [draw.random() < 0.3 + 0.4 * (i % 2) + shift / 100 for i in range(each["n"])]
            each["robust"] = hexadecimal(flags)
            metrics[checkpoint][name] = stated(sum(flags), each["n"])
    put(folder / f"{seed}.json", metrics)
    put(folder / f"{seed}.verdicts.json", verdicts)


def fill(root: Path, seeds: tuple[int, ...] = (0,)) -> dict[str, str]:
    for (rank, method), seed in itertools.product(enumerate(METHODS), seeds):
        write(root, method, COUNTS, seed=seed, last=3, aa={40: 20 + 5 * rank})
        scatter(root, method, seed, 12 * rank)
    return files(params(METHODS[:2], METHODS[2:], seeds), root)


def flags(root: Path, method: str, seed: int, name: str, checkpoint: str = "best") -> list[bool]:
    verdicts = json.loads((root / f"metrics/attack/toy/{method}/{seed}.verdicts.json").read_text())
    return binary(verdicts[checkpoint][name]["robust"], verdicts[checkpoint][name]["n"])


def exact(b: int, c: int) -> float:
    return min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))


def test_each_pair_is_counted_image_by_image_and_corrected_over_its_column(tmp_path: Path) -> None:
    table = records(fill(tmp_path)["metrics/tables/pairs.csv"])
    for column in ("clean", "pgd20", "cw"):
        own = [row for row in table if row["column"] == column]
        assert [(row["first"], row["second"]) for row in own] == list(itertools.combinations(METHODS, 2))
        ps = []
        for row in own:
            a, b = (flags(tmp_path, row[each], 0, column) for each in ("first", "second"))
            only = [sum(x > y for x, y in zip(*each, strict=True)) for each in ((a, b), (b, a))]
            assert [int(row["only_first"]), int(row["only_second"])] == only
            assert float(row["difference"]) == pytest.approx(sum(a) - sum(b))  # of 100 images: points
            assert float(row["p"]) == pytest.approx(exact(*only), rel=1e-4)
            assert float(row["low"]) < float(row["difference"]) < float(row["high"])
            ps.append(exact(*only))
        first, second, third = sorted(ps)
        steps = [
            min(1, 3 * first),
            min(1, max(3 * first, 2 * second)),
            min(1, max(3 * first, 2 * second, third)),
        ]
        assert sorted(float(row["holm"]) for row in own) == pytest.approx(steps, rel=1e-4)
        assert all((row["significant"] == "True") == (float(row["holm"]) <= 0.05) for row in own)


def test_over_seeds_trainings_and_images_have_variances_of_their_own(tmp_path: Path) -> None:
    found = fill(tmp_path, (0, 1, 2))
    row = next(
        each
        for each in records(found["metrics/tables/pairs.csv"])
        if (each["column"], each["first"], each["second"]) == ("pgd20", "pgd_at", "dynat")
    )
    grid = [
        [
            x - y
            for x, y in zip(*(flags(tmp_path, m, seed, "pgd20") for m in ("pgd_at", "dynat")), strict=True)
        ]
        for seed in range(3)
    ]
    of_seeds = [sum(each) for each in grid]  # of 100 images: points
    of_images = [100 * sum(each) / 3 for each in zip(*grid, strict=True)]
    mean = sum(of_seeds) / 3
    assert float(row["difference"]) == pytest.approx(mean, rel=1e-5)
    assert float(row["training_sd"]) == pytest.approx(
        math.sqrt(sum((each - mean) ** 2 for each in of_seeds) / 2), rel=1e-5
    )
    variance = sum((each - mean) ** 2 for each in of_images) / 99 / 100
    assert float(row["sample_se"]) == pytest.approx(math.sqrt(variance), rel=1e-5)
    text = found["metrics/tables/pairs.md"]
    assert "3 training seeds" in text
    assert "trainings and images" in text
    assert "Seeds, d = 1" in text


def test_what_is_not_significantly_below_the_best_is_printed_as_such(tmp_path: Path) -> None:
    found = fill(tmp_path)
    text, table = found["metrics/tables/toy.md"], rows(found["metrics/tables/toy.md"])
    pairs = {
        (row["column"], *sorted((row["first"], row["second"]))): row["significant"] == "True"
        for row in records(found["metrics/tables/pairs.csv"])
    }
    mark, seen = raised(text, "not significantly below the best"), set()
    for heading, column in (("Clean", "clean"), ("PGD-20", "pgd20"), ("C&W", "cw"), ("AA", "aa")):
        best = max(METHODS, key=lambda method: float(table[method][heading].split()[0]))
        for method in METHODS:
            alike = method != best and not pairs[(column, *sorted((method, best)))]
            assert (mark in table[method][heading]) == alike, (method, heading)
            seen.add(alike)
    assert seen == {True, False}


def test_the_matrix_has_each_difference_and_its_opposite(tmp_path: Path) -> None:
    found = fill(tmp_path)
    blocks = found["metrics/tables/pairs.md"].split("\n## ")
    matrix = rows(next(block for block in blocks if block.lstrip("# ").startswith("toy: PGD-20")))
    for row in records(found["metrics/tables/pairs.csv"]):
        if row["column"] == "pgd20":
            ahead, mark = float(row["difference"]), "" if row["significant"] == "True" else " n.s."
            assert matrix[row["first"]][row["second"]] == f"{ahead:+.2f}{mark}"
            assert matrix[row["second"]][row["first"]] == f"{-ahead:+.2f}{mark}"


def test_robust_overfitting_is_the_paired_loss_from_the_chosen_to_the_last_epoch(tmp_path: Path) -> None:
    table = rows(fill(tmp_path)["metrics/tables/toy.md"], 1)
    for method in METHODS:
        best, last = (flags(tmp_path, method, 0, "pgd20", each) for each in ("best", "last"))
        assert table[method]["Robust overfitting"].startswith(f"{sum(best) - sum(last):+.2f} [")


def test_train_less_test_is_of_the_last_epoch_with_the_unpaired_interval(tmp_path: Path) -> None:
    write(tmp_path, "dynat", COUNTS, last=3, train=95)
    found = files(params([], ["dynat"]), tmp_path)
    test = sum(flags(tmp_path, "dynat", 0, "pgd20", "last"))
    ends = {name: wilson(count, 100) for name, count in (("train", 95), ("test", test))}
    gap = 0.95 - test / 100
    low = gap - math.hypot(0.95 - ends["train"][0], ends["test"][1] - test / 100)
    high = gap + math.hypot(ends["train"][1] - 0.95, test / 100 - ends["test"][0])
    row = rows(found["metrics/tables/toy.md"], 1)["dynat"]
    assert row["Train less test"] == f"{100 * gap:+.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert row["PGD-20, last, training images"].startswith("95.00 [")


def test_train_less_test_over_seeds_has_their_deviation_and_no_pair_is_judged_on_training_images(
    tmp_path: Path,
) -> None:
    for seed, train in enumerate((80, 90)):
        for method in ("pgd_at", "dynat"):
            write(tmp_path, method, COUNTS, seed=seed, train=train)
    found = files(params(["pgd_at"], ["dynat"], (0, 1)), tmp_path)
    test = COUNTS["pgd20"]
    gap = rows(found["metrics/tables/toy.md"], 1)["dynat"]["Train less test"]
    assert gap == f"{85 - test:+.2f} ± {statistics.stdev((80, 90)):.2f}"
    assert not any("train" in row["column"] for row in records(found["metrics/tables/pairs.csv"]))


def test_other_conditions_are_no_pair(tmp_path: Path) -> None:
    fill(tmp_path)
    write(tmp_path, "trades", COUNTS, last=3, attack={"epsilon": 0.1})
    pairs = records(files(params(METHODS[:2], METHODS[2:]), tmp_path)["metrics/tables/pairs.csv"])
    assert {(row["first"], row["second"]) for row in pairs if row["column"] == "pgd20"} == {
        ("pgd_at", "dynat")
    }
    assert len([row for row in pairs if row["column"] == "aa"]) == 3  # AutoAttack was not run again


def test_the_average_of_attacks_is_one_score_per_image(tmp_path: Path) -> None:
    fill(tmp_path)
    found = judged(read_results(params(METHODS[:2], METHODS[2:]), tmp_path).measurements)
    (score,) = found["toy", "dynat", "all"].values()
    aa = json.loads((tmp_path / "metrics/autoattack/toy/dynat/0.verdicts.json").read_text())["best"]["square"]
    parts = [flags(tmp_path, "dynat", 0, name)[:40] for name in ("pgd10", "pgd20", "pgd50", "cw")]
    parts.append(binary(aa["robust"], 40))
    assert score.tolist() == pytest.approx([sum(each) / 5 for each in zip(*parts, strict=True)])


def test_one_method_or_none_has_no_pairs(tmp_path: Path) -> None:
    none: Any = files(params(["pgd_at"], []), tmp_path)
    write(tmp_path, "pgd_at", COUNTS)
    for found in (none, files(params(["pgd_at"], []), tmp_path)):
        assert found["metrics/tables/pairs.csv"].startswith("setting,column,first,second,")
        assert len(found["metrics/tables/pairs.csv"].splitlines()) == 1
        assert "No two methods" in found["metrics/tables/pairs.md"]
    results = read_results(params(["pgd_at"], []), tmp_path)
    assert compared(results.measurements).alike == set()
