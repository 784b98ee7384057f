"""One checked step of the chain from a printed number to its origin."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["good", "accepted", "broken", "absent"]
MARKS: dict[State, str] = {"good": "✓", "accepted": "≈", "broken": "✗", "absent": "–"}


@dataclass(frozen=True)
class Link:
    """A step, good or not; of the states only ``broken`` fails an audit.

    ``accepted``: this code was proved equal and not run; ``absent``: it could not be checked here, or is
    worth knowing.
    """

    kind: str  # printed, tables, chain, data, commit, circumstances, accepted, evidence, replay
    subject: str  # what was looked at: a file, a stage
    state: State
    text: str
    advice: str = ""  # what to do about it
    details: tuple[str, ...] = ()  # in --json only

    @property
    def line(self) -> str:
        """The link as it is printed."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{MARKS[self.state]} {self.subject}: {self.text}{advice}"


Audited = dict[str, list[Link]]  # cell -> its links


def good(kind: str, subject: str, text: str, details: Iterable[str] = ()) -> Link:
    """A link that holds."""
    return Link(kind, subject, "good", text, "", tuple(details))


def broken(kind: str, subject: str, text: str, advice: str) -> Link:
    """A link that does not hold."""
    return Link(kind, subject, "broken", text, advice)


def absent(kind: str, subject: str, text: str, advice: str = "") -> Link:
    """A link that cannot be checked here, or a circumstance that a reader should know."""
    return Link(kind, subject, "absent", text, advice)


def sound(links: Iterable[Link]) -> bool:
    """Whether no link is broken."""
    return all(link.state != "broken" for link in links)


def as_data(cells: dict[str, Any], found: Audited) -> list[dict[str, Any]]:
    """What an audit found of each cell, for JSON."""
    texts = {key: cell.get("text") for key, cell in cells.items()}
    return [
        {"cell": key, "text": texts.get(key), "ok": sound(links), "links": [*map(asdict, links)]}
        for key, links in found.items()
    ]


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more."""
    each = list(names)
    return ", ".join(each[:most]) + (f" and {len(each) - most} more" if len(each) > most else "")


def one_line(error: Exception, most: int = 150) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())[:most]
