"""Tables as Markdown and the report print them: of a setting, and of the paper beside its reproduction."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pandas as pd

from dynat.config.params import Params
from dynat.paper.cells import AVERAGED, LAST, NAMES, common, family, footnotes, name
from dynat.paper.markup import Item, Table
from dynat.paper.measurements import Results
from dynat.paper.published import TITLES, values

COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd100", "cw", "apgd-ce", "aa", "all")


def setting_tables(setting: str, params: Params, results: Results, cells: pd.DataFrame) -> list[Table]:
    """The table of the selected checkpoints and that of the last epochs; rows not run stay, empty."""
    ours = cells[cells["row"] == setting]
    usual = common(ours)
    best = sorted({*COLUMNS, *ours.loc[ours["checkpoint"] == "best", "column"]}, key=_rank)
    keys = zip(ours["method"], ours["column"], strict=True)
    items = dict(zip(keys, _items(ours, usual, params), strict=True))
    seeds = ", ".join(map(str, params.seeds))
    one = f"training seed {seeds}, 95 % Wilson interval"
    spread = one if len(params.seeds) == 1 else f"mean ± standard deviation over training seeds {seeds}"
    text = f"Accuracy in percent, {spread}; weights of the best epoch on held-out data."
    text += _conditions(usual, best, ", as in the paper's Table 1")
    other = f"The same trainings without choosing an epoch.{_conditions(usual, LAST)}"
    chosen = Table(setting, text, ["Method", *(heading(column, usual) for column in best)])
    last = Table(f"{setting}, last epoch", other, ["Method", "Epoch (chosen / last)"])
    last.head += [heading(column, usual) for column in LAST]
    for method in [*params.baselines, *params.variants]:
        label = Item(method, tuple(results.failed_checks[setting, method]))
        epochs = Item(", ".join(results.epochs[setting, method]))
        chosen.rows.append([label, *(items.get((method, column), Item()) for column in best)])
        last.rows.append([label, epochs, *(items.get((method, column), Item()) for column in LAST)])
    return [chosen, last]


def paper_table(number: int, params: Params, results: Results, cells: pd.DataFrame) -> Table:
    """Table ``number``: under each row of the paper what was reproduced, empty where nothing was run."""
    paper, ours = values(), cells[cells["row"] == f"table{number}"]
    paper, usual = paper[paper["table"] == number], common(ours)
    items = dict(zip(ours.index, _items(ours, usual, params), strict=True))
    gaps = ours["difference"].map(Item).to_dict()
    head = ["Method", "", *(heading(column, usual) for column in paper["column"].unique())]
    table = Table(TITLES[number], _introduction(paper, params, usual, ours), head, [])
    for _, group in groupby(paper.to_dict("index").items(), key=lambda each: each[1]["row"]):
        row = dict(group)
        first, doubts = next(iter(row.values())), [each["doubts"] for each in row.values()]
        of_all = tuple(text for text in doubts[0] if all(text in each for each in doubts))
        own = [tuple(text for text in each if text not in of_all) for each in doubts]
        theirs = map(Item, (each["published"] for each in row.values()), own)
        label = f"{first['method']} ({first['target']})" if number == 3 else first["method"]
        table.rows.append([Item(label, of_all), Item("paper"), *theirs])
        sanity = tuple(results.failed_checks[first["setting"], first["recipe"]])
        table.rows.append([Item(), Item("here", sanity), *(items.get(key, Item()) for key in row)])
        if row.keys() & items.keys():
            table.rows.append([Item(), Item("difference"), *(gaps.get(key, Item()) for key in row)])
    return table


def _introduction(paper: pd.DataFrame, params: Params, usual: dict[str, Any], ours: pd.DataFrame) -> str:
    text = "Accuracy in percent: the paper's, and below it the reproduction in "
    text += " and ".join(paper["setting"].unique())
    text += ", 95 % Wilson interval." if len(params.seeds) == 1 else ", mean ± standard deviation over seeds."
    text += _conditions(usual, list(paper["column"].unique()))
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


def _items(cells: pd.DataFrame, usual: dict[str, Any], params: Params) -> list[Item]:
    """Each cell as a table prints it, with its footnotes."""
    found = cells.to_dict("records")
    return [Item(each["text"], footnotes(each, usual, params.seeds), each["cell"]) for each in found]


def _rank(column: str) -> tuple[int, int]:
    """Order of the columns: PGD-k by k, wherever k comes from, and AutoAttack on more samples behind AA."""
    attack, number = family(column)
    return [*NAMES, attack].index(attack), int(number or 0)


def heading(column: str, usual: dict[str, Any]) -> str:
    """A column's heading, with its number of test images where something was run."""
    return f"{name(column)} (n={usual[column]['n']})" if column in usual else name(column)


def _conditions(usual: dict[str, Any], columns: Iterable[str], source: str = "") -> str:
    """Epsilon and attack seed of the columns, named apart where they differ; what ``all`` is and mixes."""
    groups: dict[str, list[str]] = {}
    for column, each in ((column, usual[column]) for column in columns if column in usual):
        text = f"ε = {each['epsilon']}, attack seed {each['attack_seed']}"
        groups.setdefault(text, []).append(name(column))
    text = "".join(
        f" {', '.join(names)}: {each}." if len(groups) > 1 else f" {each}." for each, names in groups.items()
    )
    mixed = "all" in columns
    text += f" All: mean of {', '.join(map(name, AVERAGED))}{source}." if mixed else ""
    counts = {column: usual[column]["n"] for column in AVERAGED if column in usual and column in columns}
    if fewer := [column for column, n in counts.items() if n < max(counts.values())]:
        text += f" {' and '.join(map(name, fewer))}: the first {counts[fewer[0]]} test images alone, "
        text += "easier or harder than all" + ("; All mixes both." if mixed else ".")
    return text
