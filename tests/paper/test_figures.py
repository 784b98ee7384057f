"""Figures draw what they are given."""

import pandas as pd

from dynat.paper.figures import against_epsilon


def test_a_methods_curve_against_epsilon_is_the_mean_over_its_seeds() -> None:
    seeds = [[(0.0, 90.0), (0.1, 50.0), (1.0, 0.0)], [(0.0, 96.0), (0.1, 60.0), (1.0, 0.0)]]
    mean = [[(0.0, 93.0), (0.1, 55.0), (1.0, 0.0)]]
    drawn = []
    for curves in (seeds, mean, seeds[:1]):
        points = [("dynat", seed, *point) for seed, curve in enumerate(curves) for point in curve]
        radii = pd.DataFrame(points, columns=["method", "seed", "epsilon", "accuracy"])
        drawn.append(against_epsilon("curve", radii, set()))
    assert drawn[0] == drawn[1] != drawn[2]
