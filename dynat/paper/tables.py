"""Tables as Markdown and the report print them: of a setting, and of the paper beside its reproduction."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pandas as pd

from dynat.config.params import Params
from dynat.paper.cells import AVERAGED, FAMILIES, Shared, footnotes, in_tables, name, radius, shared
from dynat.paper.markup import Item, Table
from dynat.paper.measurements import Results
from dynat.paper.published import TITLES, values

COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd100", "cw", "apgd-ce", "aa", "all")
LAST = ["last-clean", "last-pgd20"]  # columns of the last epoch in Markdown; the CSV has all of them
ALL = f" All: mean of {', '.join(map(name, AVERAGED))}"


def setting_tables(setting: str, params: Params, results: Results, cells: pd.DataFrame) -> list[Table]:
    """The table of the selected checkpoints and that of the last epochs; rows not run stay, empty."""
    ours = in_tables(cells[cells["table"] == setting])
    best = sorted({*COLUMNS, *(c for c in ours["column"] if not c.startswith("last-"))}, key=_rank)
    usual, methods = shared(ours), [*params.baselines, *params.variants]
    names = ours[["method", "column"]].itertuples(index=False, name=None)
    items = dict(zip(names, _items(ours, usual, params).values(), strict=True))
    labels = {method: Item(method, tuple(results.failed_checks[setting, method])) for method in methods}
    epochs = {method: Item(", ".join(results.epochs[setting, method])) for method in methods}

    seeds = ", ".join(map(str, params.seeds))
    one = f"training seed {seeds}, 95 % Wilson interval"
    spread = one if len(params.seeds) == 1 else f"mean ± standard deviation over training seeds {seeds}"
    text = f"Accuracy in percent, {spread}; weights of the best epoch on held-out data."
    text += f"{_shared_text(usual, best)}{ALL}, as in the paper's Table 1.{_subset_text(usual)}"
    other = f"The same trainings without choosing an epoch.{_shared_text(usual, LAST)}"
    head = ["Method", "Epoch (chosen / last)", *(heading(column, usual) for column in LAST)]
    last = [[labels[m], epochs[m], *(items.get((m, c), Item()) for c in LAST)] for m in methods]
    return [
        Table(
            setting,
            text,
            ["Method", *(heading(column, usual) for column in best)],
            [[labels[m], *(items.get((m, c), Item()) for c in best)] for m in methods],
        ),
        Table(f"{setting}, last epoch", other, head, last),
    ]


def paper_table(number: int, params: Params, results: Results, cells: pd.DataFrame) -> Table:
    """Table ``number``: under each row of the paper what was reproduced, empty where nothing was run."""
    paper, ours = values(), cells[cells["table"] == f"table{number}"]
    paper, usual = paper[paper["table"] == number], shared(ours)
    items, gaps = _items(ours, usual, params), ours["difference"].to_dict()
    head = ["Method", "", *(heading(column, usual) for column in paper["column"].unique())]
    table = Table(TITLES[number], _introduction(paper, params, usual, ours), head, [])
    for _, group in groupby(paper.to_dict("index").items(), key=lambda each: each[1]["row"]):
        row = dict(group)
        first, doubts = next(iter(row.values())), [each["doubts"] for each in row.values()]
        shared_doubts = tuple(text for text in doubts[0] if all(text in each for each in doubts))
        label = f"{first['method']} ({first['target']})" if number == 3 else first["method"]
        own = [tuple(text for text in each if text not in shared_doubts) for each in doubts]
        theirs = map(Item, (each["published"] for each in row.values()), own)
        table.rows.append([Item(label, shared_doubts), Item("paper"), *theirs])
        sanity = tuple(results.failed_checks.get((first["setting"], first["recipe"]), ()))
        table.rows.append([Item(), Item("here", sanity), *(items.get(key, Item()) for key in row)])
        if row.keys() & items.keys():
            table.rows.append([Item(), Item("difference"), *(Item(gaps.get(key, "")) for key in row)])
    return table


def _introduction(paper: pd.DataFrame, params: Params, usual: Shared, ours: pd.DataFrame) -> str:
    text = "Accuracy in percent: the paper's, and below it the reproduction in "
    text += " and ".join(paper["setting"].unique())
    text += ", 95 % Wilson interval." if len(params.seeds) == 1 else ", mean ± standard deviation over seeds."
    text += _shared_text(usual, paper["column"].unique())
    text += f"{ALL}." if "all" in paper["column"].array else ""
    text += _subset_text(usual)
    reproduced = paper.loc[ours.index, "row"]
    if len(missing := paper[~paper["row"].isin(reproduced)]):
        which = f"of {', '.join(missing['method'].unique())}" if len(reproduced) else "of its rows"
        text += f" Nothing {which} is both selected and run; `{command(missing)}` runs them."
    return text


def command(missing: pd.DataFrame) -> str:
    """What selects and runs these published values; the paper's own methods are variants."""
    lists = {"settings": missing["setting"].unique()}
    for key, group in (("baselines", "Others"), ("variants", "Ours")):
        lists[key] = missing.loc[missing["group"] == group, "recipe"].unique()
    return "uv run dvc exp run" + "".join(f" -S '{key}=[{','.join(each)}]'" for key, each in lists.items())


def _items(cells: pd.DataFrame, usual: Shared, params: Params) -> dict[Any, Item]:
    """Key -> a cell as a table prints it, with its footnotes."""
    found = cells.to_dict("index")
    return {key: Item(c["text"], footnotes(c, usual, params.seeds), str(key)) for key, c in found.items()}


def _rank(column: str) -> tuple[int, int]:
    """Order of the columns: PGD-k by k, wherever k comes from, and AutoAttack on more samples behind AA."""
    family = next((i for i, known in enumerate(FAMILIES) if column.startswith(known)), len(FAMILIES))
    return family, int("".join(filter(str.isdigit, column)) or 0)


def heading(column: str, usual: Shared) -> str:
    """A column's heading, with its number of test images where something was run."""
    n = usual.get((column, column), {}).get("n")
    return f"{name(column)} (n={n})" if n else name(column)


def _shared_text(usual: Shared, columns: Iterable[str]) -> str:
    """One sentence: epsilon and attack seed of the columns, named apart where they differ."""
    groups: dict[str, list[str]] = {}
    for column in columns:
        if found := usual.get((column, column)):
            text = f"ε = {radius(found['epsilon'])}, attack seed {found['attack_seed']}"
            groups.setdefault(text, []).append(name(column))
    if len(groups) < 2:
        return "".join(f" {text}." for text in groups)
    return "".join(f" {', '.join(columns)}: {text}." for text, columns in groups.items())


def _subset_text(usual: Shared) -> str:
    """A warning where the columns that are averaged are of different numbers of images."""
    counts = {column: usual[column, column]["n"] for column in AVERAGED if (column, column) in usual}
    fewer = [column for column, n in counts.items() if n < max(counts.values())]
    if not fewer:
        return ""
    which, count = " and ".join(map(name, fewer)), counts[fewer[0]]
    return f" {which}: the first {count} test images alone, easier or harder than all; All mixes both."
