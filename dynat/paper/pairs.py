"""Any two methods of a setting under any attack: both judged on the same images, so compared image by image.

What is not paired is not compared: other images, another epsilon, attack seed or training seed.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd

from dynat.paper.cells import AVERAGED
from dynat.paper.measurements import AVERAGE, TRAIN
from dynat.paper.statistics import ALPHA, Paired, Scores, holm, paired

OVERFITTING = "overfitting"  # a column of scores: PGD-20 of the last epoch less that of the chosen one
PAIR = ["setting", "column", "first", "second"]
FIELDS = [*PAIR, *Paired.__dataclass_fields__, "holm", "significant"]
Run = tuple[object, ...]  # seed, epsilon, attack seed: only equal ones are paired
Judged = dict[tuple[str, str, str], dict[Run, Scores]]  # by setting, method, column; [n] each


@dataclass(frozen=True)
class Compared:
    """Verdicts of every run and the pairs of methods that they decide."""

    judged: Judged
    pairs: pd.DataFrame  # see :func:`pairs`

    @cached_property
    def alike(self) -> set[tuple[str, str, str, str]]:
        """Setting, column and two methods, either way round, of the pairs that no test tells apart."""
        same = self.pairs.loc[~self.pairs["significant"].astype(bool), PAIR].to_numpy().tolist()
        return {each for s, column, a, b in same for each in ((s, column, a, b), (s, column, b, a))}


def compared(measurements: pd.DataFrame) -> Compared:
    """What can be compared among the measurements."""
    return Compared(found := judged(measurements), pairs(found))


def judged(measurements: pd.DataFrame) -> Judged:
    """The verdicts of every run, bool, and what is made of them per image, float: ``all`` and overfitting."""
    found: Judged = {}
    last = {}  # the last epoch of what was chosen: of the moving average where that was
    for each in measurements.to_dict("records"):
        if each["column"] == "pgd20":
            name = "ema-pgd20" if AVERAGE in each["caveats"] else "last-pgd20"
            last[each["setting"], each["method"], each["seed"]] = name
        runs = found.setdefault((each["setting"], each["method"], each["column"]), {})
        runs[each["seed"], each["epsilon"], each["attack_seed"]] = each["correct"]
    for setting, method in dict.fromkeys(key[:2] for key in [*found]):
        columns = (*AVERAGED, "last-pgd20", "ema-pgd20")
        own = {column: found.get((setting, method, column), {}) for column in columns}
        drop = {
            run: _joined([own[end][run], -each.astype(float)]).sum(0)
            for run, each in own["pgd20"].items()
            if run in own[end := last[setting, method, run[0]]]
        }
        by_seed = [{run[0]: (run, each) for run, each in own[column].items()} for column in AVERAGED]
        mean = {}
        for seed in by_seed[0]:
            if all(seed in each for each in by_seed):
                parts = [each[seed] for each in by_seed]
                conditions = (seed, *(run[1:] for run, _ in parts))
                mean[conditions] = _joined([each for _, each in parts]).mean(0)
        made = {"all": mean, OVERFITTING: drop}
        found |= {(setting, method, column): runs for column, runs in made.items() if runs}
    return found


def _joined(scores: list[Scores]) -> Scores:
    n = min(map(len, scores))
    return np.stack([each[:n] for each in scores])


def compare(first: dict[Run, Scores], second: dict[Run, Scores]) -> Paired | None:
    """The runs of two methods that are paired, on the first images that all have; None if there are none."""
    runs = [run for run in first if run in second]
    if not runs:
        return None
    both = _joined([each[run] for each in (first, second) for run in runs])
    return paired(both[: len(runs)], both[len(runs) :])


def pairs(found: Judged) -> pd.DataFrame:
    """A row of :data:`FIELDS` per setting, column and two methods, in the order of the methods.

    ``holm`` is p after Holm's correction over all pairs of methods of the setting in that column, so that it
    also holds for a pair that was chosen by its result, such as a method and the best of the column.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for setting, method, column in found:
        if column != OVERFITTING and not column.startswith(TRAIN):
            groups.setdefault((setting, column), []).append(method)
    rows = []
    for (setting, column), methods in groups.items():
        compared = {
            (a, b): each
            for a, b in combinations(methods, 2)
            if (each := compare(found[setting, a, column], found[setting, b, column]))
        }
        corrected = holm([each.p for each in compared.values()])
        for (pair, each), p in zip(compared.items(), corrected, strict=True):
            rows.append([setting, column, *pair, *vars(each).values(), p, p <= ALPHA])
    return pd.DataFrame(rows, columns=FIELDS)
