"""Numbers are read as people write them."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dynat.config.fields import Index, number

READ = {"8/255": 8 / 255, " 2 / 255 ": 2 / 255, "1e-3": 0.001, "5E-4": 5e-4, ".5": 0.5, "0.031": 0.031}
READ |= {"010": 10, "1.": 1, "-1": -1, "1e-3/2": 0.0005}
WORDS = ["", "1 2", "0,5", "1_000", "0x10", "1/0", "0/0", "1/2/3", "/2", "2/", "8/abc", "abc", "true"]
NO_NUMBERS = [*WORDS, "nan", "-inf", "1e999", "1e308/1e-308", True, None, math.nan, 10**5000, [1], {}, b"1"]


@pytest.mark.parametrize("text", READ)
def test_numbers_are_read_as_people_mean_them(text: str) -> None:
    assert number(text) == READ[text]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=map(str, range(len(NO_NUMBERS))))
def test_what_is_not_a_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be a"):
        number(value)


WHOLE = TypeAdapter(Index)


@pytest.mark.parametrize("text", ["10", 10, 10.0, "1e1", "20/2"])
def test_a_whole_number_is_read_however_it_is_written(text: object) -> None:
    assert repr(WHOLE.validate_python(text)) == "10"


@pytest.mark.parametrize("text", ["1.5", "1/3", True, "ten", None, math.inf, 2**32, -1, 1e300])
def test_what_is_not_a_whole_number_is_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        WHOLE.validate_python(text)


@settings(deadline=None)
@given(st.decimals(-1000, 1000, places=6), st.integers(1, 999), st.sampled_from("feg"))
def test_any_way_of_writing_a_number_gives_the_nearest_float(top: Any, bottom: int, style: str) -> None:
    text = f"{top:.6{style}}"
    assert number(text) == float(Fraction(text))
    assert number(f"{text}/{bottom}") == pytest.approx(float(Fraction(text) / bottom), rel=1e-15, abs=0)
