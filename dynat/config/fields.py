"""How params.yaml writes numbers and names, and how a fault in it is put into one line."""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

LARGEST = 1e30  # what a float32 holds with room to multiply
FRACTION = re.compile(r"\s*([^/\s]+)\s*/\s*([^/\s]+)\s*")


def number(value: object) -> float:
    """Read ``8/255``, ``1e-3``, ``"0.031"`` or a plain number as a finite float.

    Raises ``ValueError`` for anything else: booleans, NaN, infinities, words, ``1_000``, ``0x10``.
    """
    if isinstance(value, str) and "_" not in value:
        fraction = FRACTION.fullmatch(value)
        try:
            value = float(fraction[1]) / float(fraction[2]) if fraction else float(value)
        except (ValueError, ZeroDivisionError):
            raise ValueError("must be a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    if abs(value) > LARGEST:
        raise ValueError(f"must be at most {LARGEST:g} in size")
    return value


def whole(value: object) -> int:
    """Read a whole number, also written ``"10"``; raises ``ValueError`` for ``1.5``, ``true`` or words."""
    try:
        as_float = number(value)
    except ValueError:
        raise ValueError("must be a whole number") from None
    if as_float != int(as_float) or abs(as_float) > 2**53:
        raise ValueError("must be a whole number")
    return int(as_float)


def _distinct_keys(value: object, validate: Callable[[object], dict[Any, Any]]) -> dict[Any, Any]:
    """Refuse ``{75: 0.1, "75.0": 0.2}``, of which the last would win silently."""
    result = validate(value)
    if isinstance(value, dict) and len(result) < len(value):
        raise ValueError("must have each number once")
    return result


Number = Annotated[float, BeforeValidator(number)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Unit = Annotated[Number, Field(ge=0, le=1)]
Whole = Annotated[int, BeforeValidator(whole)]
Count = Annotated[Whole, Field(ge=1)]
Index = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]  # as scikit-learn takes them
ByEpoch = WrapValidator(_distinct_keys)
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


class Model(BaseModel):
    """Unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


WORDING = {  # pydantic's types of error in the words of someone who edits params.yaml
    "bool_type": "must be true or false",
    "dict_type": "must be a section with keys of its own",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "invalid_key": "a key must be a word",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "list_type": "must be a list such as [a, b]",
    "literal_error": "must be {expected}",
    "model_type": "must be a section with keys of its own",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must not be empty",
    "string_type": "must be a word",
    "too_long": "must have {max_length} or fewer entries",
    "too_short": "must have {min_length} or more entries",
    "tuple_type": "must be a list such as [a, b]",
}


def describe(error: ValidationError, root: type[BaseModel] = BaseModel) -> str:
    """The first fault of a pydantic error on ``root`` as ``key.path: what is wrong``, in one short line.

    The path is what the user would type after ``-S``: entries of a list, which are set as a whole, are not
    in it.
    """
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] in ("extra_forbidden", "invalid_key")), faults[0])
    place = [part for part in fault["loc"] if isinstance(part, str) and part != "[key]"]
    message, kind = fault["msg"].removeprefix("Value error, "), fault["type"]
    if kind == "extra_forbidden":
        message = f"unknown key{meant(place[-1], _siblings(root, place))}"
    elif kind == "missing":
        message = "is missing" if fault["loc"] and fault["loc"][-1] == place[-1] else "has too few entries"
    elif kind == "value_error" and not message.startswith("must"):
        head, _, rest = message.partition(": ")
        if rest and re.fullmatch(r"[\w.=]+", head) and place:
            place, message = [*place, head], rest  # a cross-check names a key inside the section
    else:
        if kind in WORDING:
            message = WORDING[kind].format(**fault.get("ctx", {}))
        message = f"{message}, found {shown(fault['input'])}"
    path = ".".join(part if re.fullmatch(r"[\w.=-]{1,60}", part) else shown(part) for part in place)
    return f"{path}: {message}" if path else message


def shown(value: object, limit: int = 60) -> str:
    """``value`` in one short printable line, as params.yaml would have it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\.?\d[\w.+/-]*", value, re.ASCII):
        text = value  # numbers are text until a field reads them
    else:
        try:
            text = reprlib.repr(value)
        except ValueError:  # Python prints no integer of more than 4300 digits
            text = "a huge number"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _siblings(root: type[BaseModel], place: list[str]) -> list[str]:
    """The known keys beside an unknown one, found by walking the models along its path."""
    model: Any = root
    for part in place[:-1]:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        field = model.model_fields.get(part)
        model = _inner_model(field.annotation) if field else model
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _inner_model(annotation: Any) -> Any:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return annotation


def meant(word: str, known: Iterable[object]) -> str:
    """A hint after an unknown ``word``: the closest of ``known``, or all of them."""
    names = sorted(map(str, known))
    if close := difflib.get_close_matches(word[:80], names, n=1):
        return f"; did you mean {close[0]!r}?"
    hint = f"; known: {', '.join(names) or 'none'}"
    return hint if len(hint) <= 200 else f"{hint[:197]}..."
