"""Each statistic against a plain computation that shares no code with it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynat.paper.statistics import (
    Scores,
    holm,
    images_needed,
    mcnemar,
    newcombe,
    paired,
    seeds_needed,
    unpaired,
)

Z = 1.959963984540054


def verdicts(both: int, first: int, second: int, neither: int) -> tuple[Scores, Scores]:
    """Verdicts [1,n] of two methods with these counts."""
    left = [True] * (both + first) + [False] * (second + neither)
    right = [True] * both + [False] * first + [True] * second + [False] * neither
    return np.array([left]), np.array([right])


@pytest.mark.parametrize("counts", [*itertools.product(range(8), range(8)), (30, 12), (3, 40), (200, 201)])
def test_mcnemar_is_the_sum_of_all_outcomes_that_are_no_likelier(counts: tuple[int, int]) -> None:
    m = sum(counts)
    weights = [math.comb(m, k) for k in range(m + 1)]
    expected = sum(w for w in weights if w <= weights[counts[0]]) / 2**m
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_just_what_the_step_down_procedure_rejects(ps: list[float]) -> None:
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    for level in (0.01, 0.05, 0.2, 0.7):
        rejected = set()
        for rank, i in enumerate(order):
            if ps[i] * (len(ps) - rank) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected


def test_the_interval_of_two_independent_shares_is_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873-890, Table II, row (a): 56/70 and 48/80, method 10
    assert unpaired(80, 70, 60, 80) == pytest.approx((5.24, 33.39), abs=0.005)


def roots(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval as the roots of (p - share)² = z² p (1 - p) / n."""
    a, b, c = 1 + Z * Z / n, -(2 * share + Z * Z / n), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(
    ("cells", "correction"), [((36, 12, 2, 0), 0), ((150, 20, 5, 25), 200 / 2), ((3, 4, 2, 1), 0)]
)
def test_the_paired_interval_is_the_formula_of_newcombe(
    cells: tuple[int, int, int, int], correction: float
) -> None:
    both, first, second, neither = cells
    n = sum(cells)
    p, q = (both + first) / n, (both + second) / n
    (pl, pu), (ql, qu) = roots(p, n), roots(q, n)
    numerator = both * neither - first * second - correction
    phi = numerator / math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    low = p - q - math.sqrt((p - pl) ** 2 - 2 * phi * (p - pl) * (qu - q) + (qu - q) ** 2)
    high = p - q + math.sqrt((pu - p) ** 2 - 2 * phi * (pu - p) * (q - ql) + (q - ql) ** 2)
    assert newcombe(*cells) == pytest.approx((low, high), abs=1e-12)
    found = paired(*verdicts(*cells))
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    assert (found.only_first, found.only_second, found.n, found.seeds) == (first, second, n, 1)
    assert found.difference == pytest.approx(100 * (p - q))
    assert math.isnan(found.training_sd)


@pytest.mark.parametrize("gap", [0.0, 0.06])
def test_the_paired_interval_covers_the_truth_in_95_of_100_draws(gap: float) -> None:
    rng, n, draws = np.random.default_rng(0), 200, 4000
    shares = np.array([0.45, 0.10 + gap / 2, 0.10 - gap / 2, 0.35])
    inside = sum(
        low <= gap <= high for low, high in (newcombe(*c) for c in rng.multinomial(n, shares, draws))
    )
    assert 0.94 < inside / draws < 0.97


def test_mcnemar_calls_few_of_equal_methods_different_and_finds_what_its_power_promises() -> None:
    rng, draws, points, discordant = np.random.default_rng(1), 2000, 5.0, 0.2
    n = images_needed(points, discordant)
    assert n is not None
    rates = []
    for gap in (0.0, points / 100):
        shares = [0.5, (discordant + gap) / 2, (discordant - gap) / 2, 0.5 - discordant]
        rates.append(np.mean([mcnemar(c[1], c[2]) <= 0.05 for c in rng.multinomial(n, shares, draws)]))
    assert 0.02 < rates[0] <= 0.055  # exact tests are conservative
    assert 0.75 < rates[1] < 0.83


def test_images_needed_is_the_formula_of_connor() -> None:
    z, power = 1.959963984540054, 0.8416212335729143
    expected = (z * math.sqrt(0.3) + power * math.sqrt(0.3 - 0.02**2)) ** 2 / 0.02**2
    assert images_needed(-2.0, 0.3) == math.ceil(expected) == 5885
    assert images_needed(0.0, 0.3) is None
    assert images_needed(5.0, 0.0) == images_needed(5.0, 0.05)  # a difference needs that many to disagree


def crossed(rng: np.random.Generator, seeds: int, n: int, gap: float) -> tuple[Scores, Scores]:
    """Verdicts of two methods: of images some harder, of trainings some worse."""
    image = rng.normal(size=n)
    chances = [
        0.5 + side * gap / 2 + 0.2 * np.tanh(image) + 0.05 * rng.normal(size=(seeds, 1)) for side in (1, -1)
    ]
    first, second = (rng.random((seeds, n)) < chance for chance in chances)
    return first, second


def test_several_seeds_add_the_variance_of_trainings_to_that_of_images() -> None:
    first, second = crossed(np.random.default_rng(2), 3, 50, 0.1)
    found = paired(first, second)
    rows = [
        [float(a) - float(b) for a, b in zip(*each, strict=True)] for each in zip(first, second, strict=True)
    ]
    of_seeds = [sum(row) / 50 for row in rows]
    of_images = [sum(column) / 3 for column in zip(*rows, strict=True)]
    mean = sum(of_seeds) / 3
    var_seeds = sum((each - mean) ** 2 for each in of_seeds) / 2
    var_images = sum((each - mean) ** 2 for each in of_images) / 49
    a, b = var_seeds / 3, var_images / 50
    assert found.difference == pytest.approx(100 * mean)
    assert found.training_sd == pytest.approx(100 * math.sqrt(var_seeds))
    assert found.sample_se == pytest.approx(100 * math.sqrt(b))
    half = (found.high - found.low) / 2 / 100
    freedom = (a + b) ** 2 / (a * a / 2 + b * b / 49)
    # Student's density, integrated by Simpson's rule: what lies within the interval
    edges = np.linspace(0, half / math.sqrt(a + b), 2001)
    constant = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = constant * (1 + edges**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.array([1.0, *([4.0, 2.0] * 999), 4.0, 1.0])
    assert 2 * (density * weights).sum() * edges[1] / 3 == pytest.approx(0.95, abs=1e-6)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_equal_methods_over_seeds_are_rarely_called_different_although_trainings_vary() -> None:
    rng = np.random.default_rng(3)
    draws = [crossed(rng, 3, 300, 0.0) for _ in range(400)]
    assert np.mean([paired(*each).p < 0.05 for each in draws]) < 0.08
    pooled = [mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in draws]
    assert np.mean([p < 0.05 for p in pooled]) > 0.15  # what forgetting the training variance would do


def test_scores_that_are_no_verdicts_are_compared_by_their_mean() -> None:
    first, second = np.array([[1, 0, -1, 0, 1]]), np.array([[0, 0, -1, -1, -1]])
    found = paired(first, second)
    d = [1, 0, 0, 1, 2]
    sd = math.sqrt(sum((x - 0.8) ** 2 for x in d) / 4)
    assert found.difference == pytest.approx(80)
    assert (found.high - found.low) / 2 == pytest.approx(100 * 2.7764451052 * sd / math.sqrt(5))  # t, 4


def test_what_never_differs_is_no_evidence_and_what_always_differs_is() -> None:
    same = np.array([[True, False, True]] * 2)
    assert (paired(same, same).p, paired(same[:1], same[:1]).p) == (1.0, 1.0)
    assert paired(same, ~same & False).difference == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="not paired"):
        paired(same, same[:, :2])


def test_seeds_needed_is_the_smallest_number_whose_power_suffices() -> None:
    found = seeds_needed(3.0, 2.0, 0.5)
    assert found is not None
    rng = np.random.default_rng(4)

    def share(seeds: int) -> float:
        noise = 0.5 * rng.normal(size=(20_000, 1)) + 2.0 * rng.normal(size=(20_000, seeds))
        means = 3.0 + noise.mean(1)
        return float(np.mean(means > Z * math.sqrt(4.0 / seeds + 0.25)))

    assert share(found) > 0.8
    assert share(2) < 0.8
    assert seeds_needed(0.0, 1.0, 0.0) is None
    assert seeds_needed(1.0, 1.0, 2.0) is None  # the images are too few for any number of trainings
