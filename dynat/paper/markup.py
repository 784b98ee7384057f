"""A table as Markdown that reads well as plain text too, with numbered footnotes."""

from dataclasses import dataclass, field

LETTERS = "abcdefghijklmnoprstuvwxyz"  # not digits, which would read as powers; q has no raised form
RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")


@dataclass(frozen=True)
class Entry:
    """One printed entry, its footnotes and its key in ``cells.json``, if it is a reproduced number."""

    text: str = ""
    notes: tuple[str, ...] = ()
    key: str | None = None


@dataclass
class Table:
    """A table as Markdown and the report print it; the first column holds labels."""

    title: str
    lead: str  # what a reader must know before the first number
    head: list[str] = field(default_factory=list)
    rows: list[list[Entry]] = field(default_factory=list)

    def footnotes(self) -> list[str]:
        """The distinct footnotes in order of appearance."""
        return list(dict.fromkeys(note for row in self.rows for entry in row for note in entry.notes))


def letters(number: int) -> str:
    """The mark of footnote ``number``, counted from 0: one letter, then two of them."""
    return LETTERS[number % len(LETTERS)] * (1 + number // len(LETTERS))


def marks(entry: Entry, footnotes: list[str]) -> str:
    """The raised marks of all footnotes of an entry."""
    numbers = sorted(footnotes.index(note) for note in entry.notes)
    return " ".join(map(letters, numbers)).translate(RAISED)


def markdown(tables: list[Table]) -> str:
    """The tables of one file; the first title is the file's."""
    return "\n".join(_markdown(table, "#" * min(2, rank)) for rank, table in enumerate(tables, 1))


def _markdown(table: Table, level: str) -> str:
    footnotes = table.footnotes()
    body = [[entry.text + marks(entry, footnotes) for entry in row] for row in table.rows]
    widths = [max(3, *(len(row[i]) for row in [table.head, *body])) for i in range(len(table.head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join(f"{text:{'<' if i == 0 else '>'}{widths[i]}}" for i, text in enumerate(row)) + " |"
        for row in [table.head, rule, *body]
    ]
    notes = [f"{letters(number).translate(RAISED)} {note}  " for number, note in enumerate(footnotes)]
    parts = [f"{level} {table.title}", table.lead, "\n".join(lines), "\n".join(notes).rstrip()]
    return "\n\n".join(part for part in parts if part) + "\n"
