"""The paper's Tables 1-4 beside their reproduction: value, published value, difference, doubts. No torch."""

from decimal import Decimal

from dynat.config.params import Params
from dynat.paper.markup import Entry, Table
from dynat.paper.measurements import Results
from dynat.paper.published import TITLES, PaperRow, rows
from dynat.paper.tables import (
    AVERAGED,
    Cell,
    Cells,
    Circumstances,
    circumstances,
    circumstances_text,
    entry,
    failed_checks,
    find,
    heading,
    name,
    subset_text,
)


def paper_cells(params: Params, cells: Cells) -> Cells:
    """A cell ``table1/DYNAT/aa`` for each number of the paper that has been reproduced."""
    found: Cells = {}
    for row in rows():
        for column, value in row.values.items():
            if source := find(cells, row.setting, row.recipe, column, params):
                again = Cell(source[1].measurements)
                gap = difference(again.printed.mean, value.text)
                again.extra = {"published": value.text, "difference": gap}
                found[f"{row.key}/{column}"] = again
    return found


def difference(reproduced: float, published: str) -> str:
    """Reproduced minus published in points, of the numbers as they are printed."""
    return f"{Decimal(f'{reproduced:.2f}') - Decimal(published):+.2f}"


def paper_table(number: int, params: Params, results: Results, cells: Cells) -> Table:
    """Table ``number``: under each row of the paper what was reproduced, empty where nothing was run."""
    own = [row for row in rows() if row.table == number]
    columns = list(dict.fromkeys(column for row in own for column in row.values))
    usual = {
        column: circumstances([cells[key] for row in own if (key := f"{row.key}/{column}") in cells])
        for column in columns
    }
    table = Table(TITLES[number], _lead(own, params, usual, cells))
    table.head = ["Method", "", *(heading(column, usual[column]) for column in columns)]
    for row in own:
        label = f"{row.method} ({row.target})" if number == 3 else row.method
        found = {column: cells.get(f"{row.key}/{column}") for column in columns}
        shared = _shared_notes(row)
        table.rows.append([Entry(label, shared), Entry("paper")])
        for column in columns:
            value = row.values[column]
            notes = tuple(note.text for note in value.notes if note.doubtful and note.text not in shared)
            table.rows[-1].append(Entry(value.text, notes))
        sanity = failed_checks(results.get((row.setting, row.recipe), {}))
        table.rows.append([Entry(), Entry("here", sanity)])
        for column, cell in found.items():
            source = (f"{row.key}/{column}", cell) if cell else None
            table.rows[-1].append(entry(source, column, usual, params))
        if any(found.values()):
            gaps = [Entry(cell.extra["difference"] if cell else "") for cell in found.values()]
            table.rows.append([Entry(), Entry("difference"), *gaps])
    return table


def _shared_notes(row: PaperRow) -> tuple[str, ...]:
    """The doubts about every value of a row: they are marked once, at its name."""
    doubts = [[note.text for note in value.notes if note.doubtful] for value in row.values.values()]
    return tuple(text for text in doubts[0] if all(text in each for each in doubts))


def _lead(own: list[PaperRow], params: Params, usual: dict[str, Circumstances], cells: Cells) -> str:
    settings = list(dict.fromkeys(row.setting for row in own))
    missing = [row for row in own if not any(f"{row.key}/{column}" in cells for column in row.values)]
    lead = f"Accuracy in percent: the paper's, and below it the reproduction in {' and '.join(settings)}"
    lead += ", 95 % Wilson interval." if len(params.seeds) == 1 else ", mean ± standard deviation over seeds."
    lead += circumstances_text(usual)
    if "all" in usual:
        lead += f" All: mean of {', '.join(map(name, AVERAGED))}."
    lead += subset_text(usual)
    if missing:
        methods = ", ".join(dict.fromkeys(row.method for row in missing))
        which = "of its rows" if len(missing) == len(own) else f"of {methods}"
        lead += f" Nothing {which} is both selected and run; `{command(missing)}` runs them."
    return lead


def command(missing: list[PaperRow]) -> str:
    """What selects and runs rows of the paper; its own methods are the variants, the others baselines."""
    lists = {
        "settings": [row.setting for row in missing],
        "baselines": [row.recipe for row in missing if row.group != "Ours"],
        "variants": [row.recipe for row in missing if row.group == "Ours"],
    }
    chosen = [f" -S '{key}=[{','.join(dict.fromkeys(values))}]'" for key, values in lists.items()]
    return "uv run dvc exp run" + "".join(chosen)
