"""Counting verdicts, against scipy and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from dynat.evaluation.verdicts import accuracy, decode, encode, wilson


@given(st.lists(st.booleans(), max_size=70))
def test_verdicts_come_back_as_they_were(robust: list[bool]) -> None:
    assert decode(encode(robust), len(robust)) == robust


def test_the_first_sample_is_the_highest_bit() -> None:
    assert encode([True] + [False] * 7 + [True]) == "8080"


@pytest.mark.parametrize(
    ("text", "n", "why"),
    [
        ("80", 9, "2 hexadecimal digits cannot hold the verdicts of 9 samples"),
        ("8080", 8, "4 hexadecimal digits cannot hold the verdicts of 8 samples"),
        ("ff", 7, "verdicts beyond the 7 samples"),
        ("zz", 8, "invalid literal"),
    ],
)
def test_text_that_cannot_hold_the_verdicts_is_refused(text: str, n: int, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}"):
        decode(text, n)


@pytest.mark.parametrize(("count", "n"), [(0, 20), (20, 20), (71, 400), (524, 1000)])
def test_interval_is_the_wilson_interval_of_scipy(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_accuracy_counts_and_refuses_nothing_to_count() -> None:
    counted = accuracy([True, False, True, True])
    assert (counted["accuracy"], counted["robust"], counted["n"]) == (75.0, 3, 4)
    with pytest.raises(ValueError, match=r"^no samples to count$"):
        accuracy([])


def test_accuracy_and_its_interval_are_percentages_with_four_decimals() -> None:
    expected = binomtest(2, 3).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = (round(100 * share, 4) for share in expected)
    assert accuracy([True, False, True]) == {
        "accuracy": 66.6667,
        "low": low,
        "high": high,
        "robust": 2,
        "n": 3,
    }
