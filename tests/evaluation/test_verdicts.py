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


@pytest.mark.parametrize(("text", "n"), [("80", 9), ("8080", 8), ("ff", 7), ("zz", 8)])
def test_text_that_cannot_hold_the_verdicts_is_refused(text: str, n: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(text, n)


@pytest.mark.parametrize(("count", "n"), [(0, 20), (20, 20), (71, 400), (524, 1000)])
def test_interval_is_the_wilson_interval_of_scipy(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_accuracy_counts_and_refuses_nothing_to_count() -> None:
    counted = accuracy([True, False, True, True])
    assert (counted["accuracy"], counted["robust"], counted["n"]) == (75.0, 3, 4)
    with pytest.raises(ValueError, match="no samples"):
        accuracy([])
