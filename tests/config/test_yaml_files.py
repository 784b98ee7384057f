"""The one reader of YAML reads what DVC reads."""

from pathlib import Path

import pytest
from dvc.utils.serialize import parse_yaml

from dynat.config.yaml_files import parse

ROOT = Path(__file__).parents[2]
SCALARS = (
    "1 -1 +1 010 1. .5 1e-3 5E-4 1e-05 0.031 8/255 1:30 1e999 -.inf true False TRUE yes No on ~ null Null"
)
QUOTED = """ word "1" '010' "true" '' """
NESTED = """
a: {b: [1, {c: 2}], d: }
5: number
e: |
  several
  lines
f: {}
"""


@pytest.mark.parametrize(
    "text",
    [
        *(f"- {word}" for word in (SCALARS + QUOTED).split()),
        NESTED,
        (ROOT / "params.yaml").read_text(encoding="utf-8"),
    ],
)
def test_yaml_is_read_as_dvc_reads_it(text: str) -> None:
    found, expected = parse(text), parse_yaml(text, "text")
    assert found == expected
    assert repr(found) == repr(expected)  # 1 is not True, 1.0 is not 1


@pytest.mark.parametrize("text", ["1_000", "0x10", "0o10", "2025-01-01"])
def test_what_people_may_mean_otherwise_stays_a_word_that_no_number_takes(text: str) -> None:
    assert parse(text) == text


def test_an_alias_is_its_value_where_anchors_are_allowed() -> None:
    assert parse("{a: &x [1], b: *x}") == {"a": [1], "b": [1]}
    with pytest.raises(ValueError, match="write out the value of the anchor 'x'"):
        parse("a: 1\nb: &x [1]", anchors=False)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: 1\na: 2", "'a'"),
        ("b: 0\na: 1\nc: {b: 0}\na: 2", "'a'"),
        ("{5: 1, 05: 2}", "5"),
        ("[{1: 0, 1.0: 0}]", "1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_by_its_name(text: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} stands there twice$"):
        parse(text)
