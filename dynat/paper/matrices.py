"""Methods against methods, what their numbers owe to images and seeds, and what more of either would tell."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from dynat.paper.cells import name
from dynat.paper.pairs import Compared, compare
from dynat.paper.statistics import images_needed, seeds_needed
from dynat.paper.tables import Item, Table

SUMMARY = ["clean", "pgd20", "cw", "aa"]  # the columns that have a matrix
POINTS = (0.5, 1.0, 2.0, 5.0)  # differences whose price is told
MATRIX = (
    "The row's accuracy less the column's, in points, on the same {n} images{seeds}; n.s.: not significant "
    "at 5 % after Holm's correction over all pairs of this table. {basis} `metrics/tables/pairs.csv` has "
    "every attack, with intervals and p."
)
ONE = "With one training of each a test speaks of these networks, not of what another seed would give."
SEVERAL = "The variance of trainings and that of the test images both count."
POWER = (
    "With 80 % power at 5 %, of a single pair. Images: how many test images decide a difference of d points "
    "between two given networks that disagree on as large a share of them as the pairs here (median). Seeds: "
    "how many trainings of each method decide it on the images that there are{seeds}."
)


def pair_tables(settings: list[str], compared: Compared) -> list[Table]:
    """For each setting a matrix per column of :data:`SUMMARY`, variances over seeds, and the power."""
    found = []
    for setting in settings:
        own = compared.pairs[compared.pairs["setting"] == setting]
        chosen = [column for column in SUMMARY if column in own["column"].array]
        found += [_matrix(setting, column, own[own["column"] == column]) for column in chosen]
        if chosen:
            several = bool((own["seeds"] > 1).any())
            found += [_variances(setting, compared)] if several else []
            found.append(_power(setting, own.set_index("column").loc[chosen], several))
    return found or [Table("Methods in pairs", "No two methods of a setting have been run.", ["Method", ""])]


def _span(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted({*numbers})))


def _matrix(setting: str, column: str, pairs: pd.DataFrame) -> Table:
    several = bool((pairs["seeds"] > 1).any())
    seeds = f" and {_span(pairs['seeds'])} training seeds" if several else ""
    text = MATRIX.format(n=_span(pairs["n"]), seeds=seeds, basis=SEVERAL if several else ONE)
    texts = {}
    for each in pairs.to_dict("records"):
        for sign, key in ((1, ("first", "second")), (-1, ("second", "first"))):
            mark = "" if each["significant"] else " n.s."
            texts[each[key[0]], each[key[1]]] = f"{sign * each['difference'] + 0.0:+.2f}{mark}"
    methods = list(dict.fromkeys(chain(pairs["first"], pairs["second"])))
    labels = [Item(method, setting=setting, methods=(method,)) for method in methods]
    rows = [[row, *(Item(texts.get((row.text, each), "")) for each in methods)] for row in labels]
    return Table(f"{setting}: {name(column)}", text, ["Method", *methods], rows)


def _variances(setting: str, compared: Compared) -> Table:
    text = "Accuracy in percent over seeds, 95 % interval of both variances together; behind it the standard "
    text += "deviation between trainings and the standard error from the draw of the test images, in points."
    methods = dict.fromkeys(method for own, method, _ in compared.judged if own == setting)
    table = Table(f"{setting}: trainings and images", text, ["Method", *map(name, SUMMARY)])
    for method in methods:
        items = []
        for column in SUMMARY:
            runs = compared.judged.get((setting, method, column), {})
            each = compare(runs, {run: np.zeros_like(scores) for run, scores in runs.items()})
            text = ""
            if each and each.seeds > 1:
                text = f"{each.difference:.2f} [{each.low:.1f}, {each.high:.1f}]; "
                text += f"trainings {each.training_sd:.2f}, images {each.sample_se:.2f}"
            items.append(Item(text))
        table.rows.append([Item(method, setting=setting, methods=(method,)), *items])
    return table


def _power(setting: str, pairs: pd.DataFrame, several: bool) -> Table:
    seeds = "" if several else "; with one seed the variance of trainings is unknown"
    head = ["Attack", "n", "Disagree", *(f"Images, d = {each:g}" for each in POINTS)]
    table = Table(f"{setting}: power", POWER.format(seeds=seeds), head)
    if several:
        table.head += ["Trainings, sd", *(f"Seeds, d = {each:g}" for each in POINTS)]
    for column, own in pairs.groupby(level=0, sort=False):
        share = ((own["only_first"] + own["only_second"]) / (own["n"] * own["seeds"])).median()
        images = [images_needed(d, share) for d in POINTS]
        texts: list[Any] = [_span(own["n"]), f"{100 * share:.1f} %", *images]
        if several:
            sd, se = own["training_sd"].median(), own["sample_se"].median()
            texts += [f"{sd:.2f}", *(seeds_needed(d, sd, se) or "none" for d in POINTS)]
        label = Item(name(str(column)), setting=setting)
        table.rows.append([label, *(Item(str(each)) for each in texts)])
    return table
