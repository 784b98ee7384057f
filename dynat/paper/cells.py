"""Cells, the numbers of the tables: averages of measurements, and the rule that makes text of them. No torch.

``cells.json`` says for each cell which verdicts to count, so that an audit can repeat it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from dynat.evaluation.verdicts import wilson
from dynat.paper.published import values

AVERAGED = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1
NUMBERS = ("accuracy", "low", "high", "sd", "n")
SOURCE = ("seed", "file", "pointer", "verdicts", "checkpoint", "attack", "n")  # of a cell, in cells.json
SHARED = ["n", "epsilon", "attack_seed", "train_code", "attack_code"]  # of the numbers of a column, as a rule
FORMATS = {
    "share": "{mean:.2f} [{low:.1f}, {high:.1f}]",  # one seed, one attack: 95 % Wilson interval
    "average of attacks": "{mean:.2f}",  # one seed
    "mean_sd": "{mean:.2f} ± {sd:.2f}",  # over seeds; sample standard deviation
    "mean_sd of averages of attacks": "{mean:.2f} ± {sd:.2f}",
}
FIELDS = ["table", "setting", "method", "seed", "column", "text", "rule", "format", "mean", *NUMBERS]
FIELDS += ["epsilon", "attack_seed", "caveats", "measurements", "published", "difference"]
Shared = dict[Any, dict[Any, Any]]  # (column, measured column) -> value of each of SHARED


def average(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rule of every table: average the attacks of each seed, then the seeds; in percent.

    ``counts`` has ``seed``, ``robust`` and ``n`` per seed and attack, as many for each seed; ``ValueError``
    if not. Returns ``text``, ``rule``, ``format``, ``mean`` (float) and, as text, ``NUMBERS``.
    """
    shares: dict[int, list[float]] = {}
    for each in counts:
        shares.setdefault(each["seed"], []).append(100 * each["robust"] / each["n"])
    if len({len(each) for each in shares.values()}) != 1:
        raise ValueError(f"nothing to average, or seeds with unequal attacks: {shares}")
    averages = [fmean(each) for each in shares.values()]
    found = {"mean": fmean(averages)}
    rule = "share" if len(counts) == len(averages) else "average of attacks"
    if len(averages) > 1:
        rule = "mean_sd" if rule == "share" else "mean_sd of averages of attacks"
        found["sd"] = stdev(averages)
    elif rule == "share":
        low, high = wilson(counts[0]["robust"], counts[0]["n"])
        found |= {"low": 100 * low, "high": 100 * high}
    numbers = {"accuracy": f"{found['mean']:.2f}"}
    numbers |= {name: f"{found[name]:.2f}" if name in found else "" for name in ("low", "high", "sd")}
    numbers["n"] = str(counts[0]["n"]) if len({each["n"] for each in counts}) == 1 else "mixed"
    text = FORMATS[rule].format(**found)
    return {"text": text, "rule": rule, "format": FORMATS[rule], "mean": found["mean"], **numbers}


def setting_cells(measurements: pd.DataFrame) -> pd.DataFrame:
    """A row of ``FIELDS`` per run and column, and per column the mean where several seeds were run.

    The index is the key, such as ``digits/dynat/0/aa`` or ``digits/dynat/mean/aa``; ``table`` names the file
    that prints it, ``measurements`` has the rows that were averaged.
    """
    parts = [measurements.assign(measured="", of="")[:0]]
    for _, runs in measurements.groupby(["setting", "method"], sort=False):
        by_seed = [_with_average(run) for _, run in runs.groupby("seed", sort=False)]
        together = pd.concat(by_seed)
        several = together.groupby("column")["seed"].transform("nunique") > 1
        parts += [*by_seed, together[several].assign(of="mean")]
    found: dict[str, list[dict[str, Any]]] = {}
    for each in pd.concat(parts).to_dict("records"):
        key = f"{each['setting']}/{each['method']}/{each['of']}/{each['column']}"
        found.setdefault(key, []).append({str(name): value for name, value in each.items()})
    return pd.DataFrame(map(_cell, found.values()), index=list(found), columns=FIELDS, dtype=object)


def _with_average(run: pd.DataFrame) -> pd.DataFrame:
    """The measurements of a run behind each column, ``all`` among them if its attacks are complete."""
    run = run.assign(measured=run["column"], of=run["seed"].astype(str)).set_index("column", drop=False)
    if {*AVERAGED} <= {*run["column"]}:
        run = pd.concat([run, run.loc[list(AVERAGED)].assign(column="all")])
    return run.reset_index(drop=True)


def _cell(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    first = measurements[0]
    return {
        **{name: first[name] for name in ("setting", "method", "column")},
        **{"table": first["setting"], "seed": first["of"], **average(measurements)},
        "epsilon": " ".join(dict.fromkeys(radius(each["epsilon"]) for each in measurements)),
        "attack_seed": " ".join(dict.fromkeys(str(each["attack_seed"]) for each in measurements)),
        "caveats": tuple(dict.fromkeys(caveat for each in measurements for caveat in each["caveats"])),
        "measurements": measurements,
        **{"published": "", "difference": ""},
    }


def in_tables(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that tables print: the mean over seeds, or that of the first seed that was run."""
    mean_first = cells.sort_values("seed", key=lambda seed: seed != "mean", kind="stable")
    return cells.loc[cells.index.isin(mean_first.drop_duplicates(["table", "method", "column"]).index)]


def paper_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """A cell ``table1/DYNAT/aa`` for each number of the paper that has been reproduced."""
    ours = in_tables(cells).set_index(["setting", "method", "column"], drop=False).to_dict("index")
    found = {}
    for key, paper in values().to_dict("index").items():
        if cell := ours.get((paper["setting"], paper["recipe"], paper["column"])):
            gap = difference(cell["accuracy"], paper["published"])
            printed = {"table": f"table{paper['table']}", "published": paper["published"], "difference": gap}
            found[key] = cell | printed
    return pd.DataFrame(found.values(), index=list(found), columns=FIELDS, dtype=object)


def difference(reproduced: str, published: str) -> str:
    """Reproduced minus published in points, of the numbers as they are printed."""
    return f"{Decimal(reproduced) - Decimal(published):+.2f}"


def cells_json(cells: pd.DataFrame) -> str:
    """``cells.json``, one cell a line."""
    lines = []
    for key, cell in cells.to_dict("index").items():
        compared = ("published", "difference") if cell["published"] else ()
        value = {name: cell[name] for name in ("text", "rule", "format")}
        value["numbers"] = {name: cell[name] for name in NUMBERS}
        value |= {name: cell[name] for name in (*compared, "tables")}
        value["sources"] = [{name: each[name] for name in SOURCE} for each in cell["measurements"]]
        lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


# ------------------------------------------------------ what a column has in common, and what departs from it


def shared(cells: pd.DataFrame) -> Shared:
    """The most frequent n, epsilon, attack seed and code in each column, the first one on a tie.

    An average has its own for each of its attacks.
    """
    counts: dict[Any, dict[str, Counter[Any]]] = {}
    for each in chain(*cells["measurements"]):
        column = counts.setdefault((each["column"], each["measured"]), {name: Counter() for name in SHARED})
        for name in SHARED:
            column[name].update([each[name]] if each[name] != "" else [])
    return {
        key: {name: next(iter(counted.most_common(1)), ("",))[0] for name, counted in column.items()}
        for key, column in counts.items()
    }


def footnotes(cell: Mapping[Any, Any], usual: Shared, seeds: list[int]) -> tuple[str, ...]:
    """What sets a cell apart from its column, the caveats of its numbers, and seeds that were not run."""
    notes: dict[str, None] = {}
    for each in cell["measurements"]:
        rule = usual[each["column"], each["measured"]]
        part = f"{name(each['measured'])}: " if each["column"] == "all" else ""
        own = {
            "n": f"on the first n = {each['n']} test images",
            "epsilon": f"ε = {radius(each['epsilon'])}",
            "attack_seed": f"attack seed {each['attack_seed']}",
        }
        apart = [text for key, text in own.items() if each[key] != rule[key]]
        notes |= dict.fromkeys(f"{part}{text}, unlike the rest of the column" for text in apart)
        stages = {"train_code": "train", "attack_code": each["file"].split("/")[1]}
        if other := [
            f"metrics/code/{s}.json" for key, s in stages.items() if each[key] not in ("", rule[key])
        ]:
            text = f"other code than for the rest of the column ({', '.join(other)}); run dvc repro"
            notes[text] = None
        notes |= dict.fromkeys(each["caveats"])
    run = list(dict.fromkeys(str(each["seed"]) for each in cell["measurements"]))
    if len(run) < len(seeds):
        notes[f"training seed {', '.join(run)} only; the others have not been run"] = None
    return tuple(notes)


# ---------------------------------------------------------------------------------------------------- words

FAMILIES = ("clean", "fgsm", "pgd", "cw", "apgd-ce", "aa", "all")
NAMES = {"clean": "Clean", "fgsm": "FGSM", "cw": "C&W", "apgd-ce": "APGD-CE", "all": "All"}


def name(column: str) -> str:
    """A column's name as the paper writes it."""
    if column.startswith("last-"):
        return f"{name(column.removeprefix('last-'))}, last"
    if column.startswith("pgd"):
        return f"PGD-{column[3:]}"
    return "AA" if column.startswith("aa") else NAMES.get(column, column)


def radius(epsilon: float) -> str:
    """Epsilon as people write it: 8/255 where it is a whole number of grey levels."""
    levels = epsilon * 255
    return f"{levels:.0f}/255" if abs(levels - round(levels)) < 1e-9 and 0 < levels < 255 else f"{epsilon:g}"
