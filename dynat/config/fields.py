"""How params.yaml writes numbers and names, and how a fault in it is put into one line."""

import difflib
import re
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

LARGEST = 1e30  # what a float32 holds with room to multiply


class KeyedError(ValueError):
    """A fault of a key inside a section: ``key`` as its dotted path from there."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


def number(value: object) -> float:
    """Read ``8/255``, ``1e-3``, ``"0.031"`` or a plain number as a finite float.

    Raises ``ValueError`` for anything else: booleans, NaN, infinities, words, ``1_000``, ``0x10``.
    """
    if isinstance(value, str) and "_" not in value:
        top, slash, bottom = value.partition("/")
        with suppress(ValueError, ZeroDivisionError):
            value = float(top) / float(bottom) if slash else float(top)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number such as 0.031, 1e-3 or 8/255")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"must be a finite number of at most {LARGEST:g} in size")
    return float(value)


def check_known(key: str, word: object, known: Iterable[str]) -> None:
    """Raise :class:`KeyedError` of ``key`` unless ``word`` is one of ``known``; it names the closest."""
    if word not in (names := sorted(known)):
        close = difflib.get_close_matches(str(word)[:80], names, n=1)
        suggestion = repr(close[0]) if close else ", ".join(names)[:200]
        raise KeyedError(key, f"unknown {_short(word)}; did you mean {suggestion}?")


Number = Annotated[float, BeforeValidator(number)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Radius = Annotated[Number, Field(gt=0, le=1)]  # of an attack on images in [0,1]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Index = Annotated[int, BeforeValidator(number), Field(ge=0, lt=2**32)]  # or a seed, as scikit-learn has it
Count = Annotated[Index, Field(ge=1)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            check_known(_part(key), key, cls.model_fields)
        return values


def describe(error: ValidationError) -> tuple[str, str]:
    """The first fault of a pydantic error: the key's path as typed after ``-S``, and what is wrong.

    Both are short and printable. A list of plain values is set as a whole: its entries are not in the path.
    """
    fault = error.errors(include_url=False)[0]
    path = [part for part in fault["loc"] if part != "[key]"]
    while path and isinstance(path[-1], int):
        path.pop()
    parts = [_part(str(part)) for part in path]
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, KeyedError):
        return ".".join([*parts, cause.key]), cause.reason
    reason = fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "missing" or isinstance(fault["loc"][-1], int):
        reason = f"{reason}, found {_short(fault['input'])}"
    return ".".join(parts), reason


def _part(key: object) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[\w=-]{1,60}", key) else _short(key)


def _short(value: object) -> str:
    """``value`` in one short printable line."""
    text = "null" if value is None else reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def radius(epsilon: float) -> str:
    """Epsilon as people write it: 8/255 where it is a whole number of grey levels."""
    levels = epsilon * 255
    return f"{levels:.0f}/255" if abs(levels - round(levels)) < 1e-9 and 0 < levels < 255 else f"{epsilon:g}"
