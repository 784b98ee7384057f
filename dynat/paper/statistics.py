"""Differences between methods that are judged on the same test images: tests, intervals, power. No torch.

Formulas, sources and what each number rests on are in ``docs/claims.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, t

from dynat.evaluation.verdicts import wilson

ALPHA, POWER = 0.05, 0.80  # two-sided level of every test and interval; power of every size that is asked for
SEEDS = 1000  # more are not looked for
Scores = NDArray[
    np.number | np.bool_
]  # [S,n]: of each training seed and test image, a verdict or a mean of some


@dataclass(frozen=True)
class Paired:
    """First method minus second, in points (percent of the test images)."""

    seeds: int  # S, trainings of each
    n: int  # test images
    only_first: int  # verdicts, over seeds, in which the first alone is right
    only_second: int
    difference: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided
    sample_se: float  # of the difference, from the draw of the test images
    training_sd: float  # of the difference between trainings that differ in the seed; NaN with one seed

    @property
    def disagreement(self) -> float:
        """Mean square of the difference on an image: of one seed's verdicts the share that is discordant."""
        return (self.sample_se**2 * (self.n - 1) + self.difference**2) / 1e4


def paired(first: Scores, second: Scores) -> Paired:
    """Compare the scores [S,n] of two methods on the same images, row by row of the same training seed.

    Verdicts of one seed: McNemar's exact test and Newcombe's interval, which speak of these two trainings.
    Otherwise Student's t of the mean difference; with several seeds its variance is that of images and that
    of seeds. ``ValueError`` if the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"scores of {first.shape} and {second.shape} are not paired")
    differences = first.astype(float) - second.astype(float)
    seeds, n = differences.shape
    ahead, behind = int((differences > 0).sum()), int((differences < 0).sum())
    mean, se = float(differences.mean()), float(_sd(differences.mean(0)) / sqrt(n))
    sd = float(_sd(differences.mean(1))) if seeds > 1 else float("nan")
    if seeds == 1 and first.dtype == second.dtype == np.bool_:
        both = int(np.logical_and(first, second).sum())
        ends = newcombe(both, ahead, behind, n - both - ahead - behind)
        p = mcnemar(ahead, behind)
    else:
        training = 0.0 if seeds == 1 else sd**2 / seeds
        ends, p = _student(mean, (se**2, n - 1), (training, seeds - 1))
    low, high = (100 * end for end in ends)
    return Paired(seeds, n, ahead, behind, 100 * mean, low, high, p, 100 * se, 100 * sd)


@cache  # one pair stands in several tables
def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: discordant images fall to either side like a fair coin."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, in [-1,1]: method 10 of Newcombe (1998b)."""
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    margins = first * (n - first) * second * (n - second)
    covariance = both * neither - only_first * only_second
    corrected = max(covariance - n / 2, 0.0) if covariance > 0 else covariance
    return _squared_and_added(first, n, second, n, corrected / sqrt(margins) if margins else 0.0)


def unpaired(first: float, n_first: int, second: float, n_second: int) -> tuple[float, float]:
    """95 % interval of the difference of two independent shares, in points: method 10 of Newcombe (1998a).

    ``first`` and ``second`` are percentages of ``n_first`` and ``n_second`` images.
    """
    counts = first / 100 * n_first, n_first, second / 100 * n_second, n_second
    low, high = _squared_and_added(*counts, 0.0)
    return 100 * low, 100 * high


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of one family after Holm's step-down correction (1979), in the order given."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def images_needed(points: float, discordant: float, alpha: float = ALPHA) -> int | None:
    """Test images with which McNemar's test finds a difference of ``points`` between two trainings.

    ``discordant`` is the share of images, in [0,1], on which they disagree, at least the difference itself;
    ``alpha`` is two-sided, :data:`POWER`; Connor (1987). None for a difference of 0, which no number decides.
    """
    gap = abs(points) / 100
    share = max(discordant, gap)
    if not gap:
        return None
    root = norm.isf(alpha / 2) * sqrt(share) + norm.ppf(POWER) * sqrt(share - gap**2)
    return ceil((root / gap) ** 2)


def seeds_needed(points: float, training_sd: float, sample_se: float, alpha: float = ALPHA) -> int | None:
    """Trainings of each method that decide a difference of ``points`` on the same test images.

    All in points; ``training_sd`` and ``sample_se`` as in :class:`Paired`. None where no number of seeds
    does (up to :data:`SEEDS`), as the images are too few, or the difference is 0.
    """
    seeds, factors = _factors(alpha)
    enough = factors * np.sqrt(training_sd**2 / seeds + sample_se**2) <= abs(points)
    return int(seeds[enough.argmax()]) if enough.any() else None


@cache
def _factors(alpha: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Numbers of seeds, and how many standard errors a difference must have with each to be found."""
    seeds = np.arange(2, SEEDS + 1)
    return seeds, t.isf(alpha / 2, seeds - 1) + t.ppf(POWER, seeds - 1)


def _sd(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _student(mean: float, *parts: tuple[float, int]) -> tuple[tuple[float, float], float]:
    """Interval and p of a mean whose variance is the sum of ``parts``, each with its degrees of freedom.

    Those of the sum are Satterthwaite's (1946).
    """
    variance = sum(part for part, _ in parts)
    if not variance:
        return (mean, mean), float(mean == 0)
    freedom = variance**2 / sum(part**2 / own for part, own in parts if part)
    half = float(t.isf(ALPHA / 2, freedom)) * sqrt(variance)
    return (mean - half, mean + half), float(2 * t.sf(abs(mean) / sqrt(variance), freedom))


def _squared_and_added(
    first: float, n_first: int, second: float, n_second: int, correlation: float
) -> tuple[float, float]:
    """Newcombe's interval from Wilson's of either share."""
    share, other = first / n_first, second / n_second
    (low, high), (other_low, other_high) = wilson(first, n_first), wilson(second, n_second)  # type: ignore[arg-type]
    down, up = (share - low, other_high - other), (high - share, other - other_low)
    half = [sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b)) for a, b in (down, up)]
    return share - other - half[0], share - other + half[1]
