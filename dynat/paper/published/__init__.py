"""The paper's Tables 1-4 as data: every value as printed there, with what is known of its origin.

``tables.csv`` has a line per value in the order of print; its ``notes`` are keys of ``notes.csv``, which
says which of them make a value doubtful.
"""

import csv
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

TITLES = {
    1: "Table 1: CIFAR-10, target WRN-34-10",
    2: "Table 2: CIFAR-100, target WRN-34-10",
    3: "Table 3: combined with GAIRAT, CIFAR-10",
    4: "Table 4: combined with MAIL, CIFAR-10, target ResNet-18 (inferred)",
}


@dataclass(frozen=True)
class Note:
    """What is known of a published value."""

    text: str
    doubtful: bool  # whether it speaks against taking the value as a reference


@dataclass(frozen=True)
class Value:
    """One published accuracy."""

    text: str  # percent, as printed
    notes: tuple[Note, ...]

    @property
    def doubtful(self) -> bool:
        """Whether any note makes it doubtful."""
        return any(note.doubtful for note in self.notes)


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper, and what reproduces it: a method of ``recipes`` in a setting of ``study``."""

    table: int
    group: str  # "Others" or "Ours"
    target: str
    guide: str  # empty without one
    method: str  # as the paper calls it
    setting: str
    recipe: str
    values: dict[str, Value] = field(default_factory=dict)  # by column, in the paper's order

    @property
    def key(self) -> str:
        """Its part of a cell's key, such as ``table1/DYNAT``; Table 3 has its methods twice."""
        parts = [f"table{self.table}", *([self.target] if self.table == 3 else []), self.method]
        return "/".join(parts)


@cache
def rows() -> tuple[PaperRow, ...]:
    """Every row of Tables 1-4 in the paper's order."""
    notes = {line["key"]: Note(line["text"], line["doubtful"] == "yes") for line in _read("notes.csv")}
    found: dict[str, PaperRow] = {}
    for line in _read("tables.csv"):
        row = PaperRow(
            int(line["table"]),
            line["group"],
            line["target"],
            line["guide"],
            line["method"],
            line["setting"],
            line["recipe"],
        )
        row = found.setdefault(row.key, row)
        row.values[line["attack"]] = Value(line["value"], tuple(notes[key] for key in line["notes"].split()))
    return tuple(found.values())


def _read(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(files(__name__).joinpath(name).read_text(encoding="utf-8").splitlines()))
