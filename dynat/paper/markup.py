"""A table as Markdown that reads well as plain text too, with lettered footnotes."""

from dataclasses import dataclass, field

LETTERS = "abcdefghijklmnoprstuvwxyz"  # not digits, which would read as powers; q has no raised form
RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")


@dataclass(frozen=True)
class Item:
    """A text in a table, its footnotes, and its key if it is a cell."""

    text: str = ""
    notes: tuple[str, ...] = ()
    key: str | None = None


@dataclass
class Table:
    """A table as Markdown and the report print it; the first column holds labels."""

    title: str
    introduction: str  # what a reader must know before the first number
    head: list[str]
    rows: list[list[Item]] = field(default_factory=list)

    def footnotes(self) -> dict[str, str]:
        """The distinct footnotes in order of appearance, each with its mark: one letter, then two of them."""
        notes = dict.fromkeys(note for row in self.rows for item in row for note in item.notes)
        return {note: LETTERS[i % len(LETTERS)] * (1 + i // len(LETTERS)) for i, note in enumerate(notes)}


def markdown(tables: list[Table]) -> str:
    """The tables of one file; the first title is the file's."""
    return "\n".join(_markdown(table, "#" * min(2, rank)) for rank, table in enumerate(tables, 1))


def _markdown(table: Table, level: str) -> str:
    raised = {note: mark.translate(RAISED) for note, mark in table.footnotes().items()}
    body = [
        [i.text + " ".join(m for note, m in raised.items() if note in i.notes) for i in row]
        for row in table.rows
    ]
    widths = [max(3, *map(len, column)) for column in zip(table.head, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        " | ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (table.head, rule, *body)
    ]
    grid = "\n".join(f"| {line} |" for line in lines)
    notes = "\n".join(f"{mark} {note}  " for note, mark in raised.items()).rstrip()
    parts = [f"{level} {table.title}", table.introduction, grid, notes]
    return "\n\n".join(part for part in parts if part) + "\n"
