"""The paper's tables as data: complete, in order, and with their own slips listed."""

import csv
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

from dynat.errors import UserError
from dynat.paper.published import refuse_rows, values

SHARED = Path(__file__).parents[3] / "shared" / "published.csv"


def value(number: int, method: str, attack: str) -> Decimal:
    """A published value."""
    return Decimal(values().at[f"table{number}/{method}/{attack}", "published"])


def test_rows_stand_in_the_papers_order() -> None:
    family = ["DYNAT-AWP(beta=1)", "DYNAT-Inner-AWP(beta=1)"]
    rows = {number: list(table["row"].unique()) for number, table in values().groupby("table")}
    assert rows == {
        1: [
            f"table1/{method}"
            for method in (
                *("PGD-AT", "TRADES", "MART", "FAT", "GAIRAT", "AWP", "LBGAT"),
                *("DYNAT", "DYNAT-AWP(beta=0)", *family),
            )
        ],
        2: [f"table2/{m}" for m in ("PGD-AT", "TRADES", "SAT", "AWP", "LBGAT", "DYNAT", *family)],
        3: [
            "table3/WRN-34-10/GAIRAT",
            "table3/WRN-34-10/DYNAT-Inner-GAIRAT",
            "table3/ResNet-18/GAIRAT",
            "table3/ResNet-18/DYNAT-Inner-GAIRAT",
        ],
        4: [
            f"table4/{method}"
            for method in (
                *("AT", "TRADES", "MART", "FAT", "AWP", "GAIRAT", "MAIL", "MAIL (MSE)"),
                *("DYNAT-AT-MAIL", "DYNAT-MAIL-Inner"),
            )
        ],
    }


def test_averages_of_table_1_are_right_to_a_hundredth_and_four_are_misrounded() -> None:
    first = values()[values()["table"] == 1]
    numbers = first.pivot(index="method", columns="column", values="published").map(Decimal)
    slips = {}
    for method, row in numbers.iterrows():
        attacks = row.drop(["clean", "all"])
        assert len(attacks) == 5
        mean, printed = sum(attacks) / 5, row["all"]
        assert abs(mean - printed) < Decimal("0.01"), method
        roundings = {mean.quantize(Decimal("0.01"), rule) for rule in (ROUND_HALF_UP, ROUND_HALF_EVEN)}
        if printed not in roundings:
            slips[method] = (str(mean), str(printed))
    assert slips == {
        "PGD-AT": ("54.326", "54.32"),
        "TRADES": ("55.204", "55.21"),
        "MART": ("56.256", "56.25"),
        "GAIRAT": ("52.958", "52.95"),
    }
    marked = first["notes"].map(lambda notes: any("rounded mean" in text for text in notes))
    assert set(first.loc[marked, "method"]) == set(slips)
    assert set(first.loc[marked, "column"]) == {"all"}


def test_sentences_that_the_papers_own_tables_contradict() -> None:
    # Section 4.2: "improves the cleaning accuracy by 1.16 %, and the AA attack accuracy increases by 2.90 %"
    assert value(1, "DYNAT-AWP(beta=0)", "clean") - value(1, "DYNAT", "clean") == Decimal("1.11")
    assert value(1, "DYNAT-AWP(beta=0)", "aa") - value(1, "DYNAT", "aa") == Decimal("2.90")
    # Section 4.2: DYNAT-Inner-AWP "achieves the best robustness performance under all attack scenarios"
    assert value(2, "DYNAT-Inner-AWP(beta=1)", "aa") < value(2, "DYNAT-AWP(beta=1)", "aa")
    # Section 4.4: "+4.78 %" under AA and "3.69 %" under C&W over MAIL are two different methods
    assert value(4, "DYNAT-AT-MAIL", "aa") - value(4, "MAIL", "aa") == Decimal("4.78")
    assert value(4, "DYNAT-MAIL-Inner", "cw") - value(4, "MAIL", "cw") == Decimal("3.69")


def test_every_autoattack_value_of_the_authors_is_a_multiple_of_a_tenth_and_marked() -> None:
    own = values()[(values()["group"] == "Ours") & (values()["column"] == "aa")]
    assert len(own) == 11
    assert all(Decimal(text) * 10 % 1 == 0 for text in own["published"])
    assert all(any("1,000" in text for text in doubts) for doubts in own["doubts"])


def test_copied_rows_are_marked_and_own_pgd_values_are_not() -> None:
    for key, each in values().iterrows():
        assert set(each["doubts"]) <= set(each["notes"])
        if each["group"] == "Ours" and each["column"] not in ("aa", "all", "apgd-ce"):
            assert not each["doubts"], key
        if (each["table"] == 4 and each["group"] == "Others") or each["row"] == "table1/FAT":
            assert each["doubts"], key


def test_values_are_those_of_the_shared_transcription() -> None:
    if not SHARED.exists():
        pytest.skip("the transcription of the paper is not beside this repository")
    with open(SHARED, encoding="utf-8", newline="") as file:
        expected = [
            (int(line["table"]), line["method"], line["attack"].replace("apgd", "apgd-ce"), line["value"])
            for line in csv.DictReader(file)
        ]
    found = values()[["table", "method", "column", "published"]]
    assert list(found.itertuples(index=False, name=None)) == expected


def test_weights_of_a_row_that_no_table_has_are_refused_with_the_closest() -> None:
    own = dict.fromkeys(("theirs", "ours"), "cifar10_wrn34_10")
    refuse_rows({"theirs": "table1/TRADES", "ours": "table3/WRN-34-10/GAIRAT"}, own)
    with pytest.raises(UserError, match=r"^params\.yaml: checkpoint\.theirs\.row: unknown 'table1/TRADE'; "):
        refuse_rows({"theirs": "table1/TRADE"}, own)
    with pytest.raises(
        UserError, match=r"theirs\.row: table1/TRADES is of cifar10_wrn34_10, checkpoints\.theirs"
    ):
        refuse_rows({"theirs": "table1/TRADES"}, {"theirs": "digits"})
