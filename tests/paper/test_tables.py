"""Tables print what the verdicts count, keep what was not run, and refuse or mark what would mislead."""

import json
import re
import statistics
from pathlib import Path

import pytest
from synthetic import COUNTS, files, hexadecimal, params, put, raised, records, rows, stated, write

# ----------------------------------------------------------------------------------------- what is printed


def test_one_seed_prints_accuracy_and_wilson_interval_of_its_verdicts(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27})
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    row = rows(text)["pgd_at"]
    for column, (robust, n) in {"Clean": (97, 100), "PGD-20": (74, 100), "AA": (27, 40)}.items():
        expected = stated(robust, n)
        assert row[column] == f"{100 * robust / n:.2f} [{expected['low']:.1f}, {expected['high']:.1f}]"
    assert "Clean (n=100)" in text
    assert "AA (n=40)" in text
    assert "ε = 8/255" in text


def test_several_seeds_print_mean_and_sample_standard_deviation(tmp_path: Path) -> None:
    for seed, extra in enumerate((0, 3, 4)):
        write(
            tmp_path, "pgd_at", {k: v - 5 + extra for k, v in COUNTS.items()}, seed=seed, aa={40: 20 + extra}
        )
    text = files(params(["pgd_at"], [], (0, 1, 2)), tmp_path)["metrics/tables/toy.md"]
    pgd20, aa = [69, 72, 73], [50.0, 57.5, 60.0]
    assert rows(text)["pgd_at"]["PGD-20"] == f"{statistics.mean(pgd20):.2f} ± {statistics.stdev(pgd20):.2f}"
    assert rows(text)["pgd_at"]["AA"] == f"{statistics.mean(aa):.2f} ± {statistics.stdev(aa):.2f}"


def test_all_is_the_mean_of_the_papers_five_attacks(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27})
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    assert rows(text)["pgd_at"]["All"] == f"{(76 + 74 + 73 + 71 + 67.5) / 5:.2f}"


def test_all_stays_empty_until_every_attack_was_run(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    row = rows(files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"])["pgd_at"]
    assert row["All"] == row["AA"] == ""
    assert row["C&W"] != ""


def test_last_epoch_stands_in_a_table_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, last=6)
    row = rows(files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"], 1)["pgd_at"]
    assert row["Clean, last"].startswith("91.00 ")
    assert row["PGD-20, last"].startswith("68.00 ")
    assert row["Epoch"] == "1 / 2"


def test_a_row_not_run_stays_empty_in_its_place(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27})
    write(tmp_path, "dynat", COUNTS, aa={40: 27})
    found = files(params(["pgd_at", "trades"], ["dynat"]), tmp_path)
    table = rows(found["metrics/tables/toy.md"])
    assert list(table) == ["pgd_at", "trades", "dynat"]
    assert set(table["trades"].values()) == {"trades", ""}
    empty = [row for row in records(found["metrics/tables/toy.csv"]) if row["method"] == "trades"]
    assert len(empty) == 10
    assert not any(row["accuracy"] or row["cell"] for row in empty)


def test_a_pgd_that_the_study_does_not_ask_for_has_no_column_unless_it_was_run(tmp_path: Path) -> None:
    fewer = params(["pgd_at"], [])
    study = fewer.study["toy"]
    short = study.model_copy(update={"attack": study.attack.model_copy(update={"pgd": [20]})})
    fewer = fewer.model_copy(update={"study": {"toy": short}})
    none = files(fewer, tmp_path)
    assert re.findall(r"PGD-\d+(?= +\|)", none["metrics/tables/toy.md"]) == ["PGD-20"]
    attacks = {row["attack"] for row in records(none["metrics/tables/toy.csv"])}
    assert {each for each in attacks if each.startswith("pgd")} == {"pgd20"}
    write(tmp_path, "pgd_at", COUNTS)
    head = next(
        line for line in files(fewer, tmp_path)["metrics/tables/toy.md"].splitlines() if "Method" in line
    )
    assert re.findall(r"PGD-\d+", head) == ["PGD-10", "PGD-20", "PGD-50", "PGD-100"]


def test_autoattack_on_more_samples_gets_a_column_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27, 80: 50})
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    head = next(line for line in text.splitlines() if line.startswith("| Method"))
    assert re.findall(r"AA \(n=\d+\)", head) == ["AA (n=40)", "AA (n=80)"]
    assert "62.50 [" in text


# ------------------------------------------------------------------------------------- what must not mislead


@pytest.mark.parametrize(("precision", "name"), [("bf16", "bf16"), ("tf32", "TF32")])
def test_autoattack_warning_and_mixed_precision_become_footnotes(
    precision: str, name: str, tmp_path: Path
) -> None:
    write(tmp_path, "trades", COUNTS, aa={40: 27}, attack={"precision": precision})
    odd = {"warnings": ["zero gradient"], "precision": precision}
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27}, autoattack=odd)
    text = files(params(["pgd_at", "trades"], []), tmp_path)["metrics/tables/toy.md"]
    tried, crafted = f"APGD tried in {name} first", f"attack crafted in {name}, every"
    for note in ("AutoAttack warned: zero gradient", tried):
        assert raised(text, note) in rows(text)["pgd_at"]["AA"]
    other = rows(text)["trades"]["AA"]
    assert not any(raised(text, note) in other for note in ("AutoAttack warned", tried, crafted))
    assert raised(text, crafted) in rows(text)["trades"]["PGD-20"]
    assert rows(text)["pgd_at"]["PGD-20"].endswith("]")


def test_an_average_is_marked_for_a_part_unlike_its_column(tmp_path: Path) -> None:
    for method in ("pgd_at", "trades"):
        write(tmp_path, method, COUNTS, aa={80: 50})
    write(tmp_path, "mart", COUNTS, aa={40: 27}, autoattack={"epsilon": 0.031})
    text = files(params(["mart", "pgd_at", "trades"], []), tmp_path)["metrics/tables/toy.md"]
    for note in ("AA: on the first n = 40 images, unlike", "AA: ε = 0.031, unlike"):
        assert raised(text, note) in rows(text)["mart"]["All"]
    assert rows(text)["trades"]["All"].replace(".", "").isdigit()


def test_what_the_data_file_notes_stands_beside_its_numbers(tmp_path: Path) -> None:
    note = "3 images stand in train and again in test"
    write(tmp_path, "pgd_at", COUNTS, attack={"data_notes": [note]})
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    assert raised(text, note) in rows(text)["pgd_at"]["PGD-20"]


@pytest.mark.parametrize(("precision", "name"), [("bf16", "bf16"), ("tf32", "TF32")])
def test_a_training_in_less_than_float32_is_marked(precision: str, name: str, tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, attack={"trained_in": precision})
    write(tmp_path, "trades", COUNTS, attack={"trained_in": "fp32"})
    text = files(params(["pgd_at", "trades"], []), tmp_path)["metrics/tables/toy.md"]
    assert raised(text, f"trained in {name}") in rows(text)["pgd_at"]["PGD-20"]
    assert raised(text, f"trained in {name}") not in rows(text)["trades"]["PGD-20"]


@pytest.mark.parametrize(
    ("odd", "note"),
    [
        ({"n": 50}, "n = 50 images, unlike the rest"),
        ({"attack": {"epsilon": 0.031}}, "ε = 0.031, unlike the rest"),
        ({"attack": {"attack_seed": 7}}, "attack seed 7, unlike the rest"),
    ],
)
def test_a_number_unlike_its_column_is_marked(tmp_path: Path, odd: dict[str, object], note: str) -> None:
    for method in ("pgd_at", "trades"):
        write(tmp_path, method, COUNTS)
    write(tmp_path, "mart", dict.fromkeys(COUNTS, 40), **odd)  # type: ignore[arg-type]
    text = files(params(["mart", "pgd_at", "trades"], []), tmp_path)["metrics/tables/toy.md"]
    mark = raised(text, note)
    assert all(value.endswith(mark) for key, value in rows(text)["mart"].items() if value and key != "Method")
    assert not any(mark in value for value in rows(text)["trades"].values())


def test_a_failed_sanity_check_is_marked_at_the_method(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    checks = {"monotone in epsilon": {"passed": False}, "split": {"passed": True}}
    put(
        tmp_path / "metrics/sanity/toy/pgd_at/0.json",
        {"checks": checks, "model_sha256": "pgd_at-0"},
    )
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    assert list(rows(text)) == ["pgd_at" + raised(text, "sanity check failed: monotone in epsilon")]
    assert "split" not in text


def test_seeds_that_are_missing_are_named(tmp_path: Path) -> None:
    for seed in (0, 2):
        write(tmp_path, "pgd_at", COUNTS, seed=seed)
    text = files(params(["pgd_at"], [], (0, 1, 2)), tmp_path)["metrics/tables/toy.md"]
    assert rows(text)["pgd_at"]["Clean"] == "97.00 ± 0.00" + raised(text, "training seed 0, 2 only")


def lock_file(root: Path, versions: dict[str, str]) -> None:
    """A ``dvc.lock`` in which stages (``attack_baseline@toy-mart-0``) ran with versions of their code."""
    entries = ""
    for stage, md5 in versions.items():
        kind, run = stage.split("_")[0], stage.split("@")[1].replace("-", "/")
        out = f"models/{run}" if kind == "train" else f"metrics/{kind}/{run}.json"
        files = {
            "deps": {f"metrics/code/{kind}.json": md5, "data/toy.safetensors": stage.encode().hex()},
            "outs": {out: stage.encode().hex()},
        }
        entries += f"  {stage}:\n    cmd: x\n"
        for what, hashes in files.items():
            entries += f"    {what}:\n"
            for path, each in hashes.items():
                entries += f"    - path: {path}\n      hash: md5\n      md5: {each}\n      size: 1\n"
    (root / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n{entries}")


def code_versions(root: Path, **other: str) -> dict[str, str]:
    """The version of each stage's code for three methods with results; ``other`` replaces those of mart."""
    kinds = {"mart": "baseline", "pgd_at": "baseline", "dynat": "dynat"}
    for method in kinds:
        write(root, method, COUNTS, aa={40: 27})
    stages = [f"{s}_{kinds[m]}@toy-{m}-0" for s in ("train", "attack", "autoattack") for m in kinds]
    return dict.fromkeys(stages, "same") | {f"{s}_baseline@toy-mart-0": each for s, each in other.items()}


@pytest.mark.parametrize(
    ("stage", "marked"), [("train", "Clean AA"), ("attack", "Clean"), ("autoattack", "AA")]
)
def test_a_number_that_other_code_made_than_its_column_is_marked(
    tmp_path: Path, stage: str, marked: str
) -> None:
    lock_file(tmp_path, code_versions(tmp_path, **{stage: "other"}))
    text = files(params(["mart", "pgd_at"], ["dynat"]), tmp_path)["metrics/tables/toy.md"]
    note = f"other code than for the rest of the column (metrics/code/{stage}.json); run dvc repro"
    mark = raised(text, note)
    for column in ("Clean", "AA"):
        assert rows(text)["mart"][column].endswith(mark) == (column in marked.split())
        assert not any(rows(text)[method][column].endswith(mark) for method in ("pgd_at", "dynat"))


def test_numbers_of_one_code_or_of_code_that_no_lock_records_are_not_marked(tmp_path: Path) -> None:
    selection, versions = params(["mart", "pgd_at"], ["dynat"]), code_versions(tmp_path)
    without = files(selection, tmp_path)
    assert "other code" not in without["metrics/tables/toy.md"]
    lock_file(tmp_path, versions)
    assert files(selection, tmp_path) == without
    lock_file(tmp_path, {stage: md5 for stage, md5 in versions.items() if "mart" not in stage})
    assert files(selection, tmp_path) == without


def test_columns_on_fewer_images_than_those_beside_them_are_said_to_be(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27})
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    assert "AA: the first 40 test images alone" in text
    write(tmp_path, "pgd_at", COUNTS, aa={100: 67})
    text = files(params(["pgd_at"], []), tmp_path)["metrics/tables/toy.md"]
    assert "test images alone" not in text


def test_autoattack_at_a_second_radius_is_a_column_of_its_own_behind_the_first(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27})
    folder = tmp_path / "metrics/autoattack/toy/pgd_at"
    metrics, verdicts = (json.loads((folder / f"0{end}").read_text()) for end in (".json", ".verdicts.json"))
    for n, robust in ((16, 8), (24, 9)):
        metrics["aa"][f"n{n} at 0.031"] = stated(robust, n)
    metrics["best"] |= {"square at 0.031": stated(9, 24), "apgd-ce": stated(30, 40)}
    square = {"n": 24, "robust": hexadecimal([i < 8 or i == 20 for i in range(24)])}
    first = {"n": 40, "robust": hexadecimal([i < 30 for i in range(40)])}
    verdicts["best"] |= {"square at 0.031": square, "apgd-ce": first}
    put(folder / "0.json", metrics)
    put(folder / "0.verdicts.json", verdicts)
    found = files(params(["pgd_at"], []), tmp_path)
    text = found["metrics/tables/toy.md"]
    heads = [head.strip() for head in text.splitlines()[4].strip("|").split("|")]
    assert heads[-4:] == ["AA (n=40)", "AA at ε = 0.031 (n=16)", "AA at ε = 0.031 (n=24)", "All"]
    row = text.splitlines()[6]
    assert "67.50 [" in row
    assert "50.00 [" in row
    assert "37.50 [" in row
    assert "AA at ε = 0.031: ε = 0.031, attack seed 0." in text
    lines = {line["attack"]: line for line in records(found["metrics/tables/toy.csv"])}
    assert lines["aa@0.031-n24"]["epsilon"] == "0.031"
    assert lines["aa-apgd-ce"]["accuracy"] == "75.00"  # in the CSV alone


def test_the_moving_average_has_columns_of_its_own_and_its_notes_stand_where_they_are_true(
    tmp_path: Path,
) -> None:
    write(tmp_path, "dynat", COUNTS, last=9, attack={"weights": "average", "regime": "modern"})
    folder = tmp_path / "metrics/attack/toy/dynat"
    metrics, verdicts = (json.loads((folder / f"0{end}").read_text()) for end in (".json", ".verdicts.json"))
    metrics["ema"] = {name: stated(count, 100) for name, count in (("clean", 95), ("pgd20", 72))}
    flags = {name: [i < count for i in range(100)] for name, count in (("clean", 95), ("pgd20", 72))}
    verdicts["ema"] = {name: {"n": 100, "robust": hexadecimal(each)} for name, each in flags.items()}
    put(folder / "0.json", metrics)
    put(folder / "0.verdicts.json", verdicts)
    text = files(params([], ["dynat"]), tmp_path)["metrics/tables/toy.md"]
    chosen, last = text.split("## toy, last epoch")
    (row,) = (line.split("|") for line in last.splitlines() if line.startswith("| dynat"))
    head = next(line.split("|") for line in last.splitlines() if line.startswith("| Method"))
    found = {name.strip(): value.strip() for name, value in zip(head, row, strict=True)}
    assert found["Clean, ema (n=100)"].startswith("95.00")
    assert found["PGD-20, ema (n=100)"].startswith("72.00")
    assert found["Robust overfitting"].startswith("+2.00")  # 74 less 72, its own last epoch, not less 65
    modern = "trained under the modern regime"
    assert modern in chosen
    assert modern in last
    average = "the moving average of the weights, which did no worse"
    assert average in chosen
    assert average not in last
