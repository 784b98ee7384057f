"""The paper's tables keep every row and set what was reproduced beside the published value."""

import json
import re
from pathlib import Path

from synthetic import (
    COUNTS,
    files,
    hexadecimal,
    params,
    put,
    raised,
    records,
    recount,
    stated,
    write,
)

from dynat.config.params import parse


def paper_rows(markdown: str) -> list[list[str]]:
    """The rows of a paper table, without marks."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")][2:]
    return [[re.sub("[ᵃ-ᶻ ]+$", "", text.strip()) for text in line.strip("|").split("|")] for line in lines]


def test_paper_table_keeps_every_row_and_shows_what_was_reproduced(tmp_path: Path) -> None:
    setting = "cifar10_wrn34_10"
    write(tmp_path, "dynat", COUNTS, setting=setting, aa={40: 27})
    found = files(params(["trades"], ["dynat"], settings=(setting,)), tmp_path)
    table = paper_rows(found["metrics/tables/table1.md"])
    assert [row[0] for row in table if row[1] == "paper"][:3] == ["PGD-AT", "TRADES", "MART"]
    assert sum(row[1] == "paper" for row in table) == sum(row[1] == "trained here" for row in table) == 11
    first = next(i for i, row in enumerate(table) if row[0] == "DYNAT")
    assert table[first] == ["DYNAT", "paper", "89.16", "52.88", "51.78", "51.49", "50.88", "49.20", "51.25"]
    assert [text.split(" ")[0] for text in table[first + 1][2:]] == [
        "97.00",
        "76.00",
        "74.00",
        "73.00",
        "71.00",
        "67.50",
        "72.30",
    ]
    assert table[first + 2][1:] == [
        "difference",
        "+7.84",
        "+23.12",
        "+22.22",
        "+21.51",
        "+20.12",
        "+18.30",
        "+21.05",
    ]
    trades = next(i for i, row in enumerate(table) if row[0] == "TRADES")
    assert table[trades + 1][1:] == ["trained here", "", "", "", "", "", "", ""]
    assert table[trades + 2][0] == "MART"
    cell = json.loads(found["metrics/tables/cells.json"])["table1/DYNAT/aa"]
    assert (cell["published"], cell["difference"], cell["text"][:5]) == ("49.20", "+18.30", "67.50")
    assert recount(tmp_path, cell["sources"][0]) == (0, 67.5)


def test_published_weights_stand_between_the_published_value_and_what_was_trained_here(
    tmp_path: Path,
) -> None:
    setting, header = "cifar10_wrn34_10", {"origin": "released with TRADES"}
    write(tmp_path, "dynat", COUNTS, setting=setting, aa={40: 27})
    write(tmp_path, "released", {**COUNTS, "clean": 85}, setting=setting, attack=header)
    given = {"file": "w.pt", "origin": "x", "network": {"name": "wrn"}, "row": "table1/TRADES"}
    selection = params(["trades"], ["dynat"], seeds=(1, 2), settings=(setting,)).model_dump()
    selection |= {"checkpoint": {"released": given}, "checkpoints": {"released": setting}}
    found = files(parse(selection), tmp_path)
    text = found["metrics/tables/table1.md"]
    table = paper_rows(text)
    trades = next(i for i, row in enumerate(table) if row[0] == "TRADES")
    labels = ["paper", "published weights, attacked here", "difference", "trained here"]
    assert [row[1] for row in table[trades : trades + 4]] == labels
    assert [row[2].split(" ")[0] for row in table[trades : trades + 4]] == ["85.72", "85.00", "-0.72", ""]
    assert table[trades + 4][0] == "MART"
    mark = raised(text, "weights trained elsewhere: released with TRADES")
    (line,) = (line for line in text.splitlines() if "published weights, attacked here" in line)
    assert mark in line.split("|")[3]
    assert "the others have not been run" not in line
    assert raised(text, "checkpoint released") in line.split("|")[2]
    cell = json.loads(found["metrics/tables/cells.json"])["table1/TRADES/released/clean"]
    assert (cell["published"], cell["difference"]) == ("85.72", "-0.72")
    assert recount(tmp_path, cell["sources"][0]) == (0, 85.0)
    rows = records(found["metrics/tables/table1.csv"])
    (own,) = (row for row in rows if row["weights"] == "released" and row["attack"] == "clean")
    assert (own["method"], own["accuracy"], own["cell"]) == (
        "TRADES",
        "85.00",
        "table1/TRADES/released/clean",
    )


def test_doubtful_published_values_carry_their_reason(tmp_path: Path) -> None:
    found = files(params(["trades"], []), tmp_path)
    text = found["metrics/tables/table1.md"]
    assert raised(text, "copied, not run by the authors") in next(
        line.split("|")[1] for line in text.splitlines() if "TRADES" in line
    )
    dynat = next(line for line in text.splitlines() if line.startswith("| DYNAT "))
    assert f"49.20{raised(text, 'only the first 1,000 test images')}" in dynat
    csv_rows = records(found["metrics/tables/table1.csv"])
    assert {row["attack"]: row["doubtful"] for row in csv_rows if row["method"] == "DYNAT"} == {
        **dict.fromkeys(("clean", "pgd10", "pgd20", "pgd50", "cw"), ""),
        **dict.fromkeys(("aa", "all"), "yes"),
    }
    assert len(csv_rows) == 77


def test_table_3_has_both_targets_of_the_same_method(tmp_path: Path) -> None:
    for setting, more in (("cifar10_wrn34_10", 0), ("cifar10_resnet18", -20)):
        write(tmp_path, "gairat", {k: v + more for k, v in COUNTS.items()}, setting=setting, aa={40: 27})
    found = files(params(["gairat"], [], settings=("cifar10_wrn34_10", "cifar10_resnet18")), tmp_path)
    cells = json.loads(found["metrics/tables/cells.json"])
    assert cells["table3/WRN-34-10/GAIRAT/pgd20"]["text"].startswith("74.00")
    assert cells["table3/ResNet-18/GAIRAT/pgd20"]["text"].startswith("54.00")
    assert cells["table4/GAIRAT/apgd-ce"]["text"].startswith("50.00")
    assert (
        "AA: the first 40 test images alone, easier or harder than all." in found["metrics/tables/table3.md"]
    )


def test_below_an_apgd_of_the_authors_log_stands_that_of_autoattack_and_says_so(tmp_path: Path) -> None:
    for method in ("dynat_at_mail", "mart"):
        write(tmp_path, method, COUNTS, setting="cifar10_resnet18", aa={40: 27})
        path = tmp_path / f"metrics/autoattack/cifar10_resnet18/{method}/0.json"
        metrics = json.loads(path.read_text())
        metrics["best"]["apgd-ce"] = stated(28, 40)
        put(path, metrics | {"epsilon": 0.031})
        companion = path.with_name("0.verdicts.json")
        verdicts = json.loads(companion.read_text())
        verdicts["best"]["apgd-ce"] = {"n": 40, "robust": hexadecimal([i < 28 for i in range(40)])}
        put(companion, verdicts)
    found = files(params(["mart"], ["dynat_at_mail"], settings=("cifar10_resnet18",)), tmp_path)
    cells = json.loads(found["metrics/tables/cells.json"])
    own, other = cells["table4/DYNAT-AT-MAIL/apgd-ce"], cells["table4/MART/apgd-ce"]
    assert own["text"].startswith("70.00")
    assert own["sources"][0]["file"].startswith("metrics/autoattack/")
    assert other["text"].startswith("70.00" if COUNTS["apgd-ce"] == 70 else "")
    assert other["sources"][0]["file"].startswith("metrics/attack/")
    assert "ε = 0.031, unlike the rest of the column" in found["metrics/tables/table4.md"]


def test_unselected_settings_fill_no_cell(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, setting="cifar10_wrn34_10", aa={40: 27})
    found = files(params(["pgd_at"], []), tmp_path)
    assert json.loads(found["metrics/tables/cells.json"]) == {}
    assert "settings=[cifar10_wrn34_10]" in found["metrics/tables/table1.md"]
    assert "-S 'baselines=[pgd_at,trades," in found["metrics/tables/table1.md"]


def test_a_paper_table_names_the_rows_without_a_number_and_the_command_that_runs_just_these(
    tmp_path: Path,
) -> None:
    setting = "cifar10_wrn34_10"
    methods = {"baselines": ["pgd_at", "trades", "mart", "fat", "gairat", "at_awp", "lbgat0"]}
    methods["variants"] = ["dynat", "dynat_awp_b0", "dynat_awp", "dynat_inner_awp"]
    for method in (*methods["baselines"][1:], *methods["variants"][1:]):
        write(tmp_path, method, COUNTS, setting=setting, aa={40: 27})
    selected = params(methods["baselines"], methods["variants"], settings=(setting,))
    lead = files(selected, tmp_path)["metrics/tables/table1.md"].splitlines()[2]
    assert "Nothing of PGD-AT, DYNAT is both selected and run" in lead
    assert (
        f"`uv run dvc exp run -S 'settings=[{setting}]' -S 'baselines=[pgd_at]' -S 'variants=[dynat]'`"
        in lead
    )
    for method in ("pgd_at", "dynat"):
        write(tmp_path, method, COUNTS, setting=setting, aa={40: 27})
    assert "Nothing of" not in files(selected, tmp_path)["metrics/tables/table1.md"]
