"""Figures draw what they are given."""

import re
from itertools import combinations

import pandas as pd

from dynat.paper.figures import against_epsilon, against_hours


def test_a_methods_curve_against_epsilon_is_the_mean_over_its_seeds() -> None:
    seeds = [[(0.0, 90.0), (0.1, 50.0), (1.0, 0.0)], [(0.0, 96.0), (0.1, 60.0), (1.0, 0.0)]]
    mean = [[(0.0, 93.0), (0.1, 55.0), (1.0, 0.0)]]
    drawn = []
    for curves in (seeds, mean, seeds[:1]):
        points = [("dynat", seed, *point) for seed, curve in enumerate(curves) for point in curve]
        radii = pd.DataFrame(points, columns=["method", "seed", "epsilon", "accuracy"])
        drawn.append(against_epsilon("curve", radii, set()))
    assert drawn[0] == drawn[1] != drawn[2]


def test_labels_of_points_that_lie_together_cover_neither_each_other_nor_a_point() -> None:
    hours = {"one": 1.0, "two": 1.0, "three": 1.01, "four": 1.02, "five": 1.03, "far": 3.0}
    points = pd.DataFrame({"device_hours": hours, "mean": 40.0})
    points["label"] = [f"label_{method}" for method in hours]
    svg = against_hours("cost", points, {"two"})
    place = r'anchor: (start|end)[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(label_\w+)<'
    boxes = []  # left, right, top, bottom; letters are at least 0.45 em wide
    for anchor, left, base, label in re.findall(place, svg):
        x, y, width = float(left), float(base), 0.45 * 7 * len(label)
        boxes.append((x, x + width, y - 6, y) if anchor == "start" else (x - width, x, y - 6, y))
    assert len(boxes) == len(hours)
    for left, base in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var', svg):
        boxes.append((float(left), float(left), float(base), float(base)))
    assert len(boxes) == 2 * len(hours)
    for a, b in combinations(boxes, 2):
        assert a == b or a[1] < b[0] or b[1] < a[0] or a[3] < b[2] or b[3] < a[2]
