"""The table of a setting, and the rule by which counted verdicts become printed text. No torch here.

``cells.json`` says for each printed number which verdicts to count, so that an audit can repeat it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

from dynat.config.params import Params
from dynat.evaluation.verdicts import wilson
from dynat.paper.markup import Entry, Table
from dynat.paper.measurements import Count, Measurement, Result, Results

COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd100", "cw", "apgd-ce", "aa", "all")
AVERAGED = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1
LAST = ("clean", "pgd20")  # columns of the last epoch in Markdown; the CSV has all of them
FAMILIES = ("clean", "fgsm", "pgd", "cw", "apgd-ce", "aa", "all")
NAMES = {"clean": "Clean", "fgsm": "FGSM", "cw": "C&W", "apgd-ce": "APGD-CE", "all": "All"}
T = TypeVar("T")


# ------------------------------------------------------------------------- counted verdicts -> printed text


class Printed(NamedTuple):
    """A number as it is printed; ``numbers`` are its columns in a CSV."""

    text: str
    rule: str
    format: str
    mean: float
    numbers: dict[str, str]


FORMATS = {
    "share": "{mean:.2f} [{low:.1f}, {high:.1f}]",  # one seed, one attack: 95 % Wilson interval
    "average of attacks": "{mean:.2f}",  # one seed
    "mean_sd": "{mean:.2f} ± {sd:.2f}",  # over seeds; sample standard deviation
    "mean_sd of averages of attacks": "{mean:.2f} ± {sd:.2f}",
}


def printed(counts: Sequence[Count]) -> Printed:
    """The rule of every table: average the attacks of each seed, then the seeds; in percent.

    ``counts`` holds an entry per seed and attack, as many for each seed; ``ValueError`` if not.
    """
    seeds = list(dict.fromkeys(count.seed for count in counts))
    shares = [[100 * c.robust / c.n for c in counts if c.seed == seed] for seed in seeds]
    if len({len(each) for each in shares}) != 1:
        raise ValueError(f"nothing to average, or seeds with unequal attacks: {counts}")
    averages = [fmean(each) for each in shares]
    values = {"mean": fmean(averages)}
    rule = "share" if len(shares[0]) == 1 else "average of attacks"
    if len(seeds) > 1:
        rule = "mean_sd" if rule == "share" else "mean_sd of averages of attacks"
        values["sd"] = stdev(averages)
    elif rule == "share":
        low, high = wilson(counts[0].robust, counts[0].n)
        values |= {"low": 100 * low, "high": 100 * high}
    sizes = {count.n for count in counts}
    numbers = {
        "accuracy": f"{values['mean']:.2f}",
        **{name: f"{values[name]:.2f}" if name in values else "" for name in ("low", "high", "sd")},
        "n": str(counts[0].n) if len(sizes) == 1 else "mixed",
    }
    return Printed(FORMATS[rule].format(**values), rule, FORMATS[rule], values["mean"], numbers)


NOTHING = {"accuracy": "", "low": "", "high": "", "sd": "", "n": ""}  # CSV columns of what was not run


@dataclass
class Cell:
    """A reproduced number: where it comes from and where it is printed."""

    measurements: list[Measurement]
    extra: dict[str, str] = field(default_factory=dict)  # "published", "difference"
    tables: list[str] = field(default_factory=list)  # files

    @property
    def printed(self) -> Printed:
        """Its text."""
        return printed([measurement.count for measurement in self.measurements])

    def as_json(self) -> dict[str, Any]:
        """Its entry in ``cells.json``."""
        done = self.printed
        return {
            "text": done.text,
            "rule": done.rule,
            "format": done.format,
            "numbers": done.numbers,
            **self.extra,
            "tables": self.tables,
            "sources": [asdict(measurement.source) for measurement in self.measurements],
        }


Cells = dict[str, Cell]  # key, such as digits/dynat/0/aa -> cell


def cells_json(cells: Cells) -> str:
    """``cells.json``, one cell a line."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(cell.as_json(), ensure_ascii=False)}" for key, cell in cells.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --------------------------------------------------------------------------------- the table of one setting


def setting_cells(results: Results) -> Cells:
    """A cell per result, column and checkpoint, and their mean where several seeds were run."""
    cells: Cells = {}
    for (setting, method), by_seed in results.items():
        run = {seed: found for seed, result in by_seed.items() if (found := with_average(result))}
        for seed, found in run.items():
            cells |= {f"{setting}/{method}/{seed}/{column}": Cell(each) for column, each in found.items()}
        if len(by_seed) > 1:
            for column in dict.fromkeys(column for found in run.values() for column in found):
                together = [m for found in run.values() for m in found.get(column, [])]
                if len({m.source.seed for m in together}) > 1:
                    cells[f"{setting}/{method}/mean/{column}"] = Cell(together)
    return cells


def with_average(result: Result) -> dict[str, list[Measurement]]:
    """The measurements behind each column of a result, "all" among them if its attacks are complete."""
    found = {column: [measurement] for column, measurement in result.measured.items()}
    if all(column in found for column in AVERAGED):
        found["all"] = [result.measured[column] for column in AVERAGED]
    return found


def find(cells: Cells, setting: str, method: str, column: str, params: Params) -> tuple[str, Cell] | None:
    """Key and cell of the number that a table prints: the mean over seeds, or the only seed that was run."""
    for seed in ("mean", *params.seeds):
        key = f"{setting}/{method}/{seed}/{column}"
        if key in cells:
            return key, cells[key]
    return None


def setting_tables(setting: str, params: Params, results: Results, cells: Cells) -> list[Table]:
    """The table of the selected checkpoints and that of the last epochs; rows not run stay, empty."""
    methods = [*params.baselines, *params.variants]
    seen = {key.split("/")[3] for key in cells if key.startswith(f"{setting}/")}
    best = sorted({*COLUMNS, *(column for column in seen if not column.startswith("last-"))}, key=_rank)
    last = [f"last-{column}" for column in LAST]
    seeds = ", ".join(map(str, params.seeds))
    spread = (
        f"training seed {seeds}, 95 % Wilson interval"
        if len(params.seeds) == 1
        else f"mean ± standard deviation over training seeds {seeds}"
    )
    tables = [
        Table(
            setting,
            f"Accuracy in percent, {spread}; weights of the best epoch on held-out data.",
        ),
        Table(f"{setting}, last epoch", "The same trainings without choosing an epoch."),
    ]
    for table, columns in zip(tables, (best, last), strict=True):
        found = {c: [find(cells, setting, method, c, params) for method in methods] for c in columns}
        usual = {c: circumstances([each[1] for each in entries if each]) for c, entries in found.items()}
        table.head = ["Method", *(heading(column, usual[column]) for column in columns)]
        table.lead += circumstances_text(usual)
        for rank, method in enumerate(methods):
            label = Entry(method, failed_checks(results[setting, method]))
            table.rows.append([label, *(entry(found[c][rank], c, usual, params) for c in columns)])
        if table is tables[0]:
            table.lead += f" All: mean of {', '.join(map(name, AVERAGED))}, as in the paper's Table 1."
            table.lead += subset_text(usual)
    for method, row in zip(methods, tables[1].rows, strict=True):
        row.insert(1, Entry(_epochs(results[setting, method])))
    tables[1].head.insert(1, "Epoch (chosen / last)")
    return tables


def _rank(column: str) -> tuple[int, int]:
    """Order of the columns: PGD-k by k, wherever k comes from, and AutoAttack on more samples behind AA."""
    family = next((i for i, known in enumerate(FAMILIES) if column.startswith(known)), len(FAMILIES))
    return family, int("".join(filter(str.isdigit, column)) or 0)


def _epochs(by_seed: dict[int, Result]) -> str:
    return ", ".join(f"{r.epochs['best']} / {r.epochs['last']}" for r in by_seed.values() if r.epochs)


def failed_checks(by_seed: dict[int, Result]) -> tuple[str, ...]:
    """A footnote for each failed check of the sanity suite."""
    return tuple(
        f"sanity check failed: {check} (seed {seed})"
        for seed, result in by_seed.items()
        for check in result.failed_checks
    )


# ------------------------------------------------------ what a column has in common, and what departs from it


class Circumstances(NamedTuple):
    """What most numbers of a column share; None where nothing was run."""

    n: int | None = None
    epsilon: float | None = None
    attack_seed: int | None = None
    code: Mapping[str, str] = {}  # source file of a stage -> the version that most numbers come from


def circumstances(column: Iterable[Cell]) -> Circumstances:
    """The most frequent n, epsilon, attack seed and code of a column's numbers, the first one on a tie."""
    measured = [measurement for cell in column for measurement in cell.measurements]
    if not measured:
        return Circumstances()
    return Circumstances(
        _most(measured, lambda m: m.source.n),
        _most(measured, lambda m: m.epsilon),
        _most(measured, lambda m: m.attack_seed),
        _usual_code(measured),
    )


def _usual_code(measured: list[Measurement]) -> dict[str, str]:
    versions: dict[str, Counter[str]] = {}
    for measurement in measured:
        for source, md5 in measurement.code.items():
            versions.setdefault(source, Counter())[md5] += 1
    return {source: counted.most_common(1)[0][0] for source, counted in versions.items()}


def _most(measured: list[Measurement], what: Callable[[Measurement], T]) -> T:
    return Counter(map(what, measured)).most_common(1)[0][0]


def entry(
    found: tuple[str, Cell] | None, column: str, usual: Mapping[str, Circumstances], params: Params
) -> Entry:
    """A number with a footnote for whatever sets it apart from its column.

    The parts of an average are held against the columns of their own attacks.
    """
    if found is None:
        return Entry()
    key, cell = found
    notes: dict[str, None] = {}
    parts = AVERAGED if column == "all" else (column,)
    for place, measurement in enumerate(cell.measurements):
        part = parts[place % len(parts)]
        departures = _departures(measurement, usual.get(part))
        if column == "all":
            departures = [f"{name(part)}: {each}" for each in departures]
        others = other_code(measurement, usual[column])
        notes |= dict.fromkeys([*departures, *others, *measurement.caveats])
    seeds = [str(m) for m in dict.fromkeys(m.source.seed for m in cell.measurements)]
    if len(seeds) < len(params.seeds):
        notes[f"training seed {', '.join(seeds)} only; the others have not been run"] = None
    return Entry(cell.printed.text, tuple(notes), key)


def _departures(measurement: Measurement, usual: Circumstances | None) -> list[str]:
    """In what a number is unlike the rest of its column; nothing where that column is not in the table."""
    if usual is None:
        return []
    own = {
        f"on the first n = {measurement.source.n} test images": measurement.source.n != usual.n,
        f"ε = {radius(measurement.epsilon)}": measurement.epsilon != usual.epsilon,
        f"attack seed {measurement.attack_seed}": measurement.attack_seed != usual.attack_seed,
    }
    return [f"{what}, unlike the rest of the column" for what, unlike in own.items() if unlike]


def other_code(measurement: Measurement, usual: Circumstances) -> list[str]:
    """A footnote if ``dvc.lock`` says that other code made this number than most of its column."""
    differing = [source for source, md5 in measurement.code.items() if md5 != usual.code[source]]
    if not differing:
        return []
    more = f" and {len(differing) - 2} more" if len(differing) > 2 else ""
    return [f"other code than for the rest of the column ({', '.join(differing[:2])}{more}); run dvc repro"]


def subset_text(usual: Mapping[str, Circumstances]) -> str:
    """A warning where the columns that are averaged are of different numbers of images."""
    counts = {column: usual[column].n for column in AVERAGED if column in usual}
    fewer = [column for column, n in counts.items() if n and n < max(filter(None, counts.values()))]
    if not fewer:
        return ""
    which = " and ".join(map(name, fewer))
    count = usual[fewer[0]].n
    return f" {which}: the first {count} test images alone, easier or harder than all; All mixes both."


def radius(epsilon: float) -> str:
    """Epsilon as people write it: 8/255 where it is a whole number of grey levels."""
    levels = epsilon * 255
    return f"{levels:.0f}/255" if abs(levels - round(levels)) < 1e-9 and 0 < levels < 255 else f"{epsilon:g}"


def name(column: str) -> str:
    """A column's name as the paper writes it."""
    if column.startswith("last-"):
        return f"{name(column.removeprefix('last-'))}, last"
    if column.startswith("pgd"):
        return f"PGD-{column[3:]}"
    return "AA" if column.startswith("aa") else NAMES.get(column, column)


def heading(column: str, usual: Circumstances) -> str:
    """A column's heading, with its number of test images where something was run."""
    return name(column) if usual.n is None or column == "all" else f"{name(column)} (n={usual.n})"


def circumstances_text(usual: dict[str, Circumstances]) -> str:
    """One sentence: epsilon and attack seed of the columns, named apart where they differ."""
    groups: dict[str, list[str]] = {}
    for column, each in usual.items():
        if each.epsilon is not None and column != "all":
            text = f"ε = {radius(each.epsilon)}, attack seed {each.attack_seed}"
            groups.setdefault(text, []).append(name(column))
    if len(groups) < 2:
        return "".join(f" {text}." for text in groups)
    return "".join(f" {', '.join(columns)}: {text}." for text, columns in groups.items())
