"""Cells, the numbers of the tables: averages of measurements, and the rule that makes text of them. No torch.

``cells.json`` says for each cell which verdicts to count, so that an audit can repeat it.
"""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from dynat.evaluation.verdicts import wilson
from dynat.paper.measurements import IN_AA, PREFIXES, TRAIN
from dynat.paper.published import values

TABLES, PLOTS, REPORT = "metrics/tables", "metrics/plots", "metrics/report.html"
AVERAGED = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1
LAST = (
    "last-clean",
    "last-pgd20",
    f"{TRAIN}pgd20",
)  # columns of the last epoch in Markdown; the CSV has all of them
EMA = ("ema-clean", "ema-pgd20")  # those of the moving average there
NUMBERS = ("accuracy", "low", "high", "sd", "n")
SOURCE = ("seed", "file", "pointer", "verdicts", "checkpoint", "attack", "n")  # of a cell, in cells.json
FORMATS = {
    "share": "{mean:.2f} [{low:.1f}, {high:.1f}]",  # one seed, one attack: 95 % Wilson interval
    "average of attacks": "{mean:.2f}",  # one seed
    "mean_sd": "{mean:.2f} ± {sd:.2f}",  # over seeds; sample standard deviation
    "mean_sd of averages of attacks": "{mean:.2f} ± {sd:.2f}",
}
FIELDS = ["cell", "table", "row", "setting", "method", "seed", "column", "checkpoint", "attack", "text"]
FIELDS += ["rule", "format", "mean", "numbers", *NUMBERS, "epsilon", "attack_seed", "caveats"]
FIELDS += ["measurements", "published", "difference"]
# in the order of the tables
NAMES = {"clean": "Clean", "fgsm": "FGSM", "pgd": "PGD-{}", "cw": "C&W", "apgd-ce": "APGD-CE", "aa": "AA"}
NAMES |= {"aa-n": "AA", "aa@": "AA at ε = {}", "all": "All", IN_AA: "APGD-CE in AA"}
WHICH = {"": "", TRAIN: ", last, training images", "last-": ", last", "ema-": ", ema"}
Measured = dict[Any, Any]  # a Measurement as a dictionary


def average(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rule of every table: average the attacks of each seed, then the seeds; in percent.

    ``counts`` has ``seed``, ``robust`` and ``n`` per seed and attack, as many for each seed; ``ValueError``
    if not. Returns ``text``, ``rule``, ``format``, ``mean`` (float) and ``numbers``: ``NUMBERS`` as text.
    """
    shares: dict[int, list[float]] = {}
    for each in counts:
        shares.setdefault(each["seed"], []).append(100 * each["robust"] / each["n"])
    if len({len(each) for each in shares.values()}) != 1:
        raise ValueError(f"nothing to average, or seeds with unequal attacks: {shares}")
    averages = [fmean(each) for each in shares.values()]
    found = dict.fromkeys(("mean", "accuracy"), fmean(averages))
    rule = "share" if len(counts) == len(averages) else "average of attacks"
    if len(averages) > 1:
        rule = "mean_sd" if rule == "share" else "mean_sd of averages of attacks"
        found["sd"] = stdev(averages)
    elif rule == "share":
        found["low"], found["high"] = (100 * end for end in wilson(counts[0]["robust"], counts[0]["n"]))
    numbers = {name: f"{found[name]:.2f}" if name in found else "" for name in NUMBERS}
    numbers["n"] = str(counts[0]["n"]) if len({each["n"] for each in counts}) == 1 else "mixed"
    text = FORMATS[rule].format_map(found)
    return {"text": text, "rule": rule, "format": FORMATS[rule], "mean": found["mean"], "numbers": numbers}


def setting_cells(measurements: pd.DataFrame) -> pd.DataFrame:
    """A row of ``FIELDS`` per run and column, and per column the mean where several seeds were run.

    The index and ``cell`` are the key, such as ``digits/dynat/0/aa`` or ``digits/dynat/mean/aa``; ``table``
    is the name of the CSV file with the cell, ``row`` that of the Markdown and empty where it has no place,
    as for the seeds behind a mean; ``measurements`` has the rows that were averaged.
    """
    methods: dict[tuple[str, str], dict[str, dict[str, list[Measured]]]] = {}
    for each in measurements.to_dict("records"):
        seeds = methods.setdefault((each["setting"], each["method"]), {})
        seeds.setdefault(str(each["seed"]), {})[each["column"]] = [each]
    found = []
    for seeds in methods.values():
        runs = list(seeds.values())
        for run in runs:
            if {*AVERAGED} <= run.keys():
                run["all"] = [run[column][0] for column in AVERAGED]
        columns = {column: [run[column] for run in runs if column in run] for column in chain(*runs)}
        seeds["mean"] = {column: [*chain(*each)] for column, each in columns.items() if len(each) > 1}
        found += [
            _cell(seed, column, measured, seed == "mean" or column not in seeds["mean"])
            for seed, run in seeds.items()
            for column, measured in run.items()
        ]
    return pd.DataFrame(found, columns=FIELDS, dtype=object).set_index("cell", drop=False)


def _cell(seed: str, column: str, measurements: list[Measured], of_all_seeds: bool) -> dict[str, Any]:
    cell = measurements[0] | average(measurements)
    setting, attack = cell["setting"], attack_of(column)
    printed = column in (*LAST, *EMA) or (attack == column and column != IN_AA)
    cell["row"] = setting if of_all_seeds and printed else ""
    cell |= {"cell": f"{setting}/{cell['method']}/{seed}/{column}", "table": setting, "seed": seed}
    cell |= {"column": column, "attack": attack, "measurements": measurements}
    for field in ("epsilon", "attack_seed"):
        cell[field] = " ".join(dict.fromkeys(str(each[field]) for each in measurements))
    cell["caveats"] = tuple(dict.fromkeys(chain(*(each["caveats"] for each in measurements))))
    return cell | cell["numbers"] | {"published": "", "difference": ""}


def paper_cells(cells: pd.DataFrame, weights: Mapping[str, str]) -> pd.DataFrame:
    """A cell ``table1/DYNAT/aa`` for each number of the paper that has been reproduced.

    ``weights`` maps a checkpoint to the row whose published weights it is; a number of theirs, measured in
    the row's setting, is ``table1/DYNAT/<checkpoint>/aa``.
    """
    rows = cells[(cells["row"] != "") | (cells["column"] == IN_AA)].to_dict("records")
    ours = {(each["setting"], each["method"], each["column"]): each for each in rows}  # the mean comes last
    found = []
    for paper in values().to_dict("records"):
        own_weights = [name for name, row in weights.items() if row == paper["row"]]
        for method in (paper["recipe"], *own_weights):
            if cell := ours.get((paper["setting"], method, paper["counterpart"])):
                behind = f"{method}/" if method in own_weights else ""
                own = {"cell": f"{paper['row']}/{behind}{paper['column']}"}
                own |= dict.fromkeys(("table", "row"), f"table{paper['table']}")
                if cell["column"] == IN_AA:  # to be told from the rest of the paper's column
                    moved = [each | {"column": paper["column"]} for each in cell["measurements"]]
                    cell = {**cell, "measurements": moved}
                gap = difference(cell["accuracy"], paper["published"])
                found.append(cell | own | {"published": paper["published"], "difference": gap})
    return pd.DataFrame(found, columns=FIELDS, dtype=object).set_index("cell", drop=False)


def difference(reproduced: str, published: str) -> str:
    """Reproduced minus published in points, of the numbers as they are printed."""
    return f"{Decimal(reproduced) - Decimal(published):+.2f}"


def cells_json(cells: pd.DataFrame) -> str:
    """``cells.json``, one cell a line."""
    lines = []
    for cell in cells.to_dict("records"):
        names = ("text", "rule", "format", "numbers", "published", "difference")
        value = {name: cell[name] for name in names if cell[name]}
        printed = [f"{TABLES}/{cell['row']}.md", REPORT] if cell["row"] else []
        value["tables"] = [*printed, f"{TABLES}/{cell['table']}.csv"]
        value["sources"] = [{name: each[name] for name in SOURCE} for each in cell["measurements"]]
        lines.append(f"{json.dumps(cell['cell'])}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def attack_of(column: str) -> str:
    """A column without what tells its checkpoint."""
    return column.removeprefix(_prefix(column))


def _prefix(column: str) -> str:
    return next((each for each in PREFIXES.values() if each and column.startswith(each)), "")


def family(column: str) -> tuple[str, str]:
    """An attack without its number of steps or samples, and that number: ``pgd`` and ``20``.

    Of AutoAttack at a radius of its own that is the number: ``aa@`` and ``8/255``.
    """
    attack = attack_of(column)
    if attack.startswith("aa@"):
        return "aa@", attack.removeprefix("aa@").rpartition("-n")[0].replace("-", "/")
    return attack.rstrip("0123456789"), attack[len(attack.rstrip("0123456789")) :]


def name(column: str) -> str:
    """A column's name as the paper writes it."""
    attack, number = family(column)
    return NAMES.get(attack, attack).format(number) + WHICH[_prefix(column)]
