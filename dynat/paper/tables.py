"""Tables as Markdown and the report print them: of a setting, and of the paper beside its reproduction."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from statistics import mode
from typing import Any

import numpy as np
import pandas as pd

from dynat.config.params import Params, Study
from dynat.paper.cells import AVERAGED, EMA, LAST, NAMES, Measured, family, name
from dynat.paper.measurements import ELSEWHERE, TRAIN, Results
from dynat.paper.pairs import OVERFITTING, Compared, Judged, compare
from dynat.paper.published import TITLES, values
from dynat.paper.statistics import ALPHA, unpaired

COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd100", "cw", "apgd-ce", "aa", "all")
DEPARTURES = {  # what the numbers of a column have in common -> the footnote of one that departs from it
    "n": "on the first n = {n} images, unlike the rest of the column",
    "epsilon": "ε = {epsilon}, unlike the rest of the column",
    "attack_seed": "attack seed {attack_seed}, unlike the rest of the column",
    "train_code": "other code than for the rest of the column (metrics/code/train.json); run dvc repro",
    "attack_code": "other code than for the rest of the column (metrics/code/{kind}.json); run dvc repro",
}
PROSE = 36  # characters; a column with a longer text is set left
LETTERS = "abcdefghijklmnoprstuvwxyz"  # not digits, which would read as powers; q has no raised form
RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")
LIKE_THE_BEST = (
    "not significantly below the best of the column (paired on the same images; metrics/tables/pairs.md)"
)
NO_GAP = "not significant: 0 is in the unpaired 95 % interval, of the draw of images alone"
OVERFITTING_IS = (
    " Robust overfitting: PGD-20 of the chosen epoch less that of the last, in points, with the 95 % "
    "interval of the paired difference. Train less test: PGD-20 of the last epoch's weights, never of their "
    "average, on as many training images, not augmented, less that on the test images, with the unpaired "
    "interval; over seeds mean ± standard deviation."
)
HERE, PUBLISHED_WEIGHTS = "trained here", "published weights, attacked here"
NO_OVERFITTING = "not significant at 5 %, uncorrected"
Usual = dict[str, dict[str, Any]]  # column -> the value of each of DEPARTURES that most of its numbers have


@dataclass(frozen=True)
class Item:
    """A text in a table, its footnotes, and its key if it is a cell; of a label, what its row is about."""

    text: str = ""
    notes: tuple[str, ...] = ()
    key: str | None = None
    setting: str = ""
    methods: tuple[str, ...] = ()  # recipes


@dataclass
class Table:
    """A table as Markdown and the report print it; the first column holds labels."""

    title: str
    introduction: str  # what a reader must know before the first number
    head: list[str]
    rows: list[list[Item]] = field(default_factory=list)

    def prose(self) -> set[int]:
        """The columns that are set left: that of the labels, and those with a text of more than a number."""
        texts = ((rank, item.text) for row in self.rows for rank, item in enumerate(row))
        return {0, *(rank for rank, text in texts if len(text) > PROSE)}

    def words(self) -> set[int]:
        """The columns whose first text begins with a letter; the page sets them left and breaks lines."""
        first = self.rows[0] if self.rows else []
        return {rank for rank, item in enumerate(first) if item.text[:1].isalpha()}

    def footnotes(self) -> dict[str, str]:
        """The distinct footnotes in order of appearance, each with its mark: one letter, then two of them."""
        notes = dict.fromkeys(note for row in self.rows for item in row for note in item.notes)
        return {note: LETTERS[i % len(LETTERS)] * (1 + i // len(LETTERS)) for i, note in enumerate(notes)}


def columns(study: Study) -> list[str]:
    """Those of :data:`COLUMNS` that ``study`` asks for."""
    left_out = {column for column in COLUMNS if column.startswith("pgd")}
    left_out -= {f"pgd{steps}" for steps in study.attack.pgd}
    left_out |= {"all"} if left_out & {*AVERAGED} else set()
    return [column for column in COLUMNS if column not in left_out]


def setting_tables(
    setting: str, params: Params, results: Results, cells: pd.DataFrame, compared: Compared
) -> list[Table]:
    """The table of the selected checkpoints and that of the last epochs; rows not run stay, empty."""
    ours = cells[cells["row"] == setting]
    usual = common(ours)
    best = sorted(
        {*columns(params.study[setting]), *ours.loc[ours["checkpoint"] == "best", "column"]}, key=_rank
    )
    found = ours.to_dict("records")
    items = {(cell["method"], cell["column"]): _item(cell, usual, params.seeds) for cell in found}
    for key in _like_the_best(setting, found, compared):
        items[key] = replace(items[key], notes=(*items[key].notes, LIKE_THE_BEST))
    seeds = ", ".join(map(str, params.seeds))
    one = f"training seed {seeds}, 95 % Wilson interval"
    spread = one if len(params.seeds) == 1 else f"mean ± standard deviation over training seeds {seeds}"
    text = f"Accuracy in percent, {spread}; weights of the best epoch on held-out data."
    text += _conditions(usual, best, ", as in the paper's Table 1")
    ends = [*LAST, *(column for column in EMA if column in usual)]
    other = f"The same trainings without choosing an epoch.{_conditions(usual, ends)}"
    chosen = Table(setting, text, ["Method", *_headings(best, usual)])
    head = [
        "Method",
        "Epoch (chosen / last)",
        *_headings(ends, usual),
        "Robust overfitting",
        "Train less test",
    ]
    last = Table(f"{setting}, last epoch", other, head)
    for method in params.methods(setting):
        failed = tuple(results.failed_checks[setting, method])
        label = Item(method, failed, setting=setting, methods=(method,))
        epochs = Item(", ".join(results.epochs[setting, method]))
        chosen.rows.append([label, *(items.get((method, column), Item()) for column in best)])
        if method in params.checkpoint:  # which has one epoch
            continue
        numbers = [items.get((method, column), Item()) for column in ends]
        signs = [each(compared.judged, setting, method) for each in (_overfitting, _train_less_test)]
        last.rows.append([label, epochs, *numbers, *signs])
    last.introduction += OVERFITTING_IS if any(row[-2].text for row in last.rows) else ""
    return [chosen, last] if last.rows else [chosen]


def _like_the_best(setting: str, cells: list[Measured], compared: Compared) -> list[tuple[str, str]]:
    """Method and column of the cells that no test tells apart from the largest number of their column."""
    best: dict[str, Measured] = {}
    for cell in cells:
        if cell["mean"] > best.get(cell["column"], {"mean": -1})["mean"]:
            best[cell["column"]] = cell
    keys = [(cell["method"], cell["column"]) for cell in cells]
    return [(m, c) for m, c in keys if (setting, c, m, best[c]["method"]) in compared.alike]


def _overfitting(found: Judged, setting: str, method: str) -> Item:
    """PGD-20 of the chosen epoch less that of the last, in points, on the same images."""
    drop = found.get((setting, method, OVERFITTING), {})
    lost = compare({run: np.zeros_like(each) for run, each in drop.items()}, drop)
    if lost is None:
        return Item()
    return Item(
        f"{lost.difference:+.2f} [{lost.low:.1f}, {lost.high:.1f}]", (NO_OVERFITTING,) * (lost.p > ALPHA)
    )


def _train_less_test(found: Judged, setting: str, method: str) -> Item:
    """PGD-20 of the last epoch on training images less that on test images, in points."""
    seen, held = (found.get((setting, method, f"{each}pgd20"), {}) for each in (TRAIN, "last-"))
    runs = [(seen[run], held[run]) for run in seen if run in held]
    both = [(100 * float(a.mean()), len(a), 100 * float(b.mean()), len(b)) for a, b in runs]
    if not both:
        return Item()
    gaps = [train - test for train, _, test, _ in both]
    if len(gaps) > 1:
        return Item(f"{np.mean(gaps):+.2f} ± {np.std(gaps, ddof=1):.2f}")
    low, high = unpaired(*both[0])
    return Item(f"{gaps[0]:+.2f} [{low:.1f}, {high:.1f}]", (NO_GAP,) * (low <= 0 <= high))


def paper_table(number: int, params: Params, results: Results, cells: pd.DataFrame) -> Table:
    """Table ``number``: under each row of the paper what was reproduced, empty where nothing was run."""
    paper, ours = values(), cells[cells["row"] == f"table{number}"]
    paper, usual = paper[paper["table"] == number], common(ours)
    found = ours.to_dict("index")
    items = {key: _item(cell, usual, params.seeds) for key, cell in found.items()}
    text = "Accuracy in percent: the paper's, and below it the reproduction in "
    text += " and ".join(paper["setting"].unique())
    text += ", 95 % Wilson interval." if len(params.seeds) == 1 else ", mean ± standard deviation over seeds."
    text += _conditions(usual, columns := list(paper["column"].unique()))
    trained = paper.index.intersection(ours.index)
    if len(missing := paper[~paper["row"].isin(paper.loc[trained, "row"])]):
        which = f"of {', '.join(missing['method'].unique())}" if items else "of its rows"
        text += f" Nothing {which} is both selected and run; `{command(missing)}` runs them."
    table = Table(TITLES[number], text, ["Method", "", *_headings(columns, usual)])

    def gap(key: str, n: int) -> Item:
        return _gap(found[key], n) if key in found else Item()

    for _, group in groupby(paper.to_dict("index").items(), key=lambda each: each[1]["row"]):
        row = dict(group)
        first, doubts = next(iter(row.values())), [each["doubts"] for each in row.values()]
        of_all = tuple(text for text in doubts[0] if all(text in each for each in doubts))
        own = [tuple(text for text in each if text not in of_all) for each in doubts]
        theirs = map(Item, (each["published"] for each in row.values()), own)
        label = f"{first['method']} ({first['target']})" if number == 3 else first["method"]
        sources = {name: f"{name}/" for name, of in params.published_weights.items() if of == first["row"]}
        sources |= {first["recipe"]: ""}
        of_row = Item(label, of_all, setting=first["setting"], methods=tuple(sources))
        table.rows.append([of_row, Item("paper"), *theirs])
        for method, behind in sources.items():
            notes = [f"checkpoint {method}"] * bool(behind)
            notes += results.failed_checks[first["setting"], method]
            source = Item(PUBLISHED_WEIGHTS if behind else HERE, tuple(notes))
            keys = {f"{first['row']}/{behind}{each['column']}": each["images"] for each in row.values()}
            differences = [Item("difference"), *(gap(key, n) for key, n in keys.items())]
            ran = bool(keys.keys() & items.keys())
            if ran or not behind:
                table.rows.append([Item(), source, *(items.get(key, Item()) for key in keys)])
            table.rows += [[Item(), *differences]] * ran
    return table


def _gap(cell: Measured, n: int) -> Item:
    """Reproduced minus published; ``n`` images are behind the latter, 0 if its interval cannot be told."""
    if not n or cell["n"] == "mixed":
        return Item(cell["difference"])
    low, high = unpaired(cell["mean"], int(cell["n"]), float(cell["published"]), n)
    return Item(cell["difference"], (NO_GAP,) * (low <= 0 <= high))


def command(missing: pd.DataFrame) -> str:
    """What selects and runs these published values; the paper's own methods are variants."""
    lists = {"settings": missing["setting"].unique()}
    for key, group in (("baselines", "Others"), ("variants", "Ours")):
        lists[key] = missing.loc[missing["group"] == group, "recipe"].unique()
    return "uv run dvc exp run" + "".join(f" -S '{key}=[{','.join(each)}]'" for key, each in lists.items())


def common(cells: pd.DataFrame) -> Usual:
    """The most frequent values behind each column, the first one on a tie."""
    columns: dict[str, list[Measured]] = {}
    for each in chain(*cells["measurements"]):
        columns.setdefault(each["column"], []).append(each)
    return {
        column: {key: mode([each[key] for each in group if each[key] != ""] or [""]) for key in DEPARTURES}
        for column, group in columns.items()
    }


def _item(cell: Measured, usual: Usual, seeds: list[int]) -> Item:
    """A cell with its caveats, what sets it apart from its column, and the seeds if some were not run."""
    notes = []
    for each in cell["measurements"]:
        part = f"{name(each['column'])}: " if cell["column"] == "all" else ""
        apart = [key for key in DEPARTURES if each[key] not in ("", usual[each["column"]][key])]
        notes += [part + DEPARTURES[key].format_map(each) for key in apart] + list(each["caveats"])
    run = dict.fromkeys(str(each["seed"]) for each in cell["measurements"])
    if len(run) < len(seeds) and not any(text.startswith(ELSEWHERE) for text in cell["caveats"]):
        notes.append(f"training seed {', '.join(run)} only; the others have not been run")
    return Item(cell["text"], tuple(dict.fromkeys(notes)), cell["cell"])


def _rank(column: str) -> tuple[int, int]:
    """Order of the columns: PGD-k by k, wherever k comes from, and AutoAttack on more samples behind AA."""
    attack, number = family(column)
    return [*NAMES, attack].index(attack), int(column.rpartition("-n")[2] if attack == "aa@" else number or 0)


def _headings(columns: Iterable[str], usual: Usual) -> list[str]:
    """The names of the columns, with the number of test images where something was run."""
    return [f"{name(c)} (n={usual[c]['n']})" if c in usual else name(c) for c in columns]


def _conditions(usual: Usual, columns: Iterable[str], source: str = "") -> str:
    """Epsilon and attack seed of the columns, named apart where they differ; what ``all`` is and mixes."""
    groups: dict[str, list[str]] = {}
    for column, each in ((column, usual[column]) for column in columns if column in usual):
        text = f"ε = {each['epsilon']}, attack seed {each['attack_seed']}"
        groups.setdefault(text, []).append(name(column))
    apart, mixed = len(groups) > 1, "all" in columns
    text = "".join(f" {', '.join(of)}: {each}." if apart else f" {each}." for each, of in groups.items())
    text += f" All: mean of {', '.join(map(name, AVERAGED))}{source}." if mixed else ""
    counts = {column: usual[column]["n"] for column in AVERAGED if column in usual and column in columns}
    if fewer := [column for column, n in counts.items() if n < max(counts.values())]:
        text += f" {' and '.join(map(name, fewer))}: the first {counts[fewer[0]]} test images alone, "
        text += "easier or harder than all" + ("; All mixes both." if mixed else ".")
    return text


def markdown(tables: list[Table]) -> str:
    """The tables of one file; the first title is the file's. Reads well as plain text too."""
    return "\n".join(_markdown(table, "#" * min(2, rank)) for rank, table in enumerate(tables, 1))


def _markdown(table: Table, level: str) -> str:
    raised = {note: mark.translate(RAISED) for note, mark in table.footnotes().items()}
    columns = []
    for rank, (head, *items) in enumerate(zip(table.head, *table.rows, strict=True)):
        texts = [i.text + " ".join(m for note, m in raised.items() if note in i.notes) for i in items]
        width = max(3, len(head), *map(len, texts))
        left = rank in table.prose()
        align, rule = "<" if left else ">", "-" * (width - 1) + ("-" if left else ":")
        columns.append([f"{text:{align}{width}}" for text in (head, rule, *texts)])
    grid = "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
    notes = "\n".join(f"{mark} {note}  " for note, mark in raised.items()).rstrip()
    parts = [f"{level} {table.title}", table.introduction, grid, notes]
    return "\n\n".join(part for part in parts if part) + "\n"
