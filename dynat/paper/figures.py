"""Figures as SVG text: the same bytes for the same numbers, legible on light and on dark ground.

Text and axes take the colour of the page (``currentColor``), lines the page's ``--c0`` to ``--c5``; text
stays text, in the page's font. The frames are those of :class:`dynat.paper.measurements.Results`.
"""

import io
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pandas as pd
from matplotlib import rcParams, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

INK = "#0a0b0c"  # stands for currentColor until the SVG is written
COLOURS = ("#0000c0", "#0000c1", "#0000c2", "#0000c3", "#0000c4", "#0000c5")  # stand for --c0 to --c5
MARKERS = ("", "o", "s", "^")  # of the curves for which no colour is left
STYLE = ["default", "dynat.paper.figures"]  # figures.mplstyle
CURVES = {  # label -> column of the histories, line, and which colour of a method
    "training": ("train_clean", "--", 0),
    "test": ("test_clean", "-", 0),
    "held-out, PGD": ("validation_robust", ":", 1),
}


@style.context(STYLE)
def training(name: str, histories: pd.DataFrame, methods: Sequence[str]) -> str:
    """Training and test accuracy (percent) per epoch, Figure 3; a method may have several seeds.

    A single method gets a small panel, with its accuracy under PGD on held-out images.
    """
    single = len(methods) == 1
    axes = _axes(2.6 if single else 4.6, 2.1, xlabel="epoch", ylabel="accuracy, %", ylim=(0, 102))
    for rank, method in enumerate(methods):
        runs = [run for _, run in histories[histories["method"] == method].groupby("seed", sort=False)]
        for run, label in product(runs, list(CURVES)[: 3 if single else 2]):
            column, line, colour = CURVES[label]
            points = run.loc[run[column] != "", ["epoch", column]].astype(float)
            text = None if run is not runs[0] or points.empty else label if single else f"{method}, {label}"
            axes.plot(*points.to_numpy().T, line, color=COLOURS[rank + colour], lw=1.2, label=text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best" if single else "lower right", fontsize=8)
    if single:
        axes.set_title(methods[0], fontsize=9)
    return _svg(axes, name)


@style.context(STYLE)
def intervals(name: str, cells: pd.DataFrame, family: Sequence[str], label: str) -> str:
    """A dot and its interval per method (index of ``cells``), first on top. Figure 4.

    The interval is Wilson's of one seed, one standard deviation to both sides of several.
    """
    left = 0.2 + 0.075 * max(map(len, cells.index))
    axes = _axes(4.6, 0.7 + 0.24 * len(cells), left, xlabel=label, ylim=(0.4, len(cells) + 0.6))
    places = range(len(cells), 0, -1)
    for place, (method, cell) in zip(places, cells.iterrows(), strict=True):
        mean, sd = cell["mean"], cell["sd"]
        ends = (mean - float(sd), mean + float(sd)) if sd else (float(cell["low"]), float(cell["high"]))
        colour = COLOURS[method in family]
        axes.plot(ends, [place, place], color=colour, lw=2, alpha=0.5)
        axes.plot([mean], [place], "o", color=colour, ms=5)
        text = axes.annotate(cell["accuracy"], (ends[1], place), (5, 0), textcoords="offset points")
        text.set(va="center", fontsize=8)
    axes.set_yticks(list(places), list(cells.index))
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    return _svg(axes, name)


@style.context(STYLE)
def bars(name: str, means: pd.DataFrame) -> str:
    """Accuracy (percent) of each method (column) under each attack (index), side by side. Figure 5."""
    axes = _axes(4.6, 2.4, ylabel="accuracy, %", ylim=(0, 105))
    width = 0.8 / means.shape[1]
    for rank, (method, heights) in enumerate(means.items()):
        places = [place + (rank + 0.5) * width - 0.4 for place in range(len(heights))]
        drawn = axes.bar(places, heights, width * 0.92, color=COLOURS[rank], label=method)
        axes.bar_label(drawn, heights.map("{:.2f}".format), fontsize=6, padding=1)
    axes.set_xticks(range(len(means)), list(means.index))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, ncols=means.shape[1])
    return _svg(axes, name)


@style.context(STYLE)
def against_epsilon(name: str, radii: pd.DataFrame, dashed: set[str]) -> str:
    """Accuracy (percent) against epsilon, a method's mean over its seeds; the ``dashed`` ones are baselines.

    The largest epsilon, 1, where every image is in the ball, is left to the sanity checks.
    """
    axes = _axes(4.6, 3.0, xlabel="ε", ylabel="accuracy, %", ylim=(0, 102))
    methods, means = list(radii["method"].unique()), radii.groupby(["method", "epsilon"])["accuracy"].mean()
    for method in methods:
        family = [each for each in methods if (each in dashed) == (method in dashed)]
        turn, place = divmod(family.index(method), len(COLOURS))
        points, line = means[method][:-1], "--" if method in dashed else "-"
        (curve,) = axes.plot(points.index, points, line, color=COLOURS[place], lw=1.2, label=method)
        curve.set(marker=MARKERS[turn % len(MARKERS)], ms=3)
    axes.legend(fontsize=7, ncols=1 + (len(methods) > 8), loc="upper right")
    return _svg(axes, name)


@style.context(STYLE)
def against_hours(name: str, points: pd.DataFrame, family: set[str]) -> str:
    """Accuracy under AutoAttack (``mean``, percent) against the ``device_hours`` of a training.

    A point per method (index of ``points``), round for the ``family`` and else square, and beside it its
    ``label``, where it covers no other.
    """
    unit, factor = ("hours", 1) if points["device_hours"].max() >= 1 else ("minutes", 60)
    axes = _axes(4.6, 3.0, xlabel=f"device {unit} of a training", ylabel="AutoAttack, %")
    points = points.sort_values(["device_hours", "mean"], ascending=False, kind="stable")
    places = [*zip(factor * points["device_hours"], points["mean"], strict=True)]
    for method, place in zip(points.index, places, strict=True):
        axes.plot(*place, "o" if method in family else "s", color=COLOURS[method in family], ms=5)
    axes.margins(x=0.3, y=0.15)
    axes.figure.subplots_adjust(right=0.94)  # half of a long number below the axis
    axes.autoscale_view()  # at once: where labels go depends on it
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(places)]
    for label, place in zip(points["label"], places, strict=True):
        line = {"arrowstyle": "-", "color": INK, "lw": 0.4, "shrinkA": 0, "shrinkB": 3}
        text = axes.annotate(label, place, (0, 0), textcoords="offset points", fontsize=7, arrowprops=line)
        for height, (side, align) in product((3, -8, 11, -16, 19, -24), ((4, "left"), (-4, "right"))):
            text.set(position=(side, height), ha=align)
            text.get_window_extent()  # moves it; its own extent has the line as well
            box = Text.get_window_extent(text)
            if axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and not box.count_overlaps(taken):
                break
        taken.append(box)
    return _svg(axes, name)


def _axes(width: float, height: float, left: float = 0.5, **settings: Any) -> Axes:
    """The axes of an empty figure; size in inches, ``left`` what the labels there need."""
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left / width, 0.45 / height, 1 - 0.1 / width, 1 - 0.25 / height)
    return figure.subplots(subplot_kw=settings)


def _svg(axes: Axes, name: str) -> str:
    """The figure as an inline SVG element whose ids begin with ``name``."""
    text, figure = io.StringIO(), axes.figure
    assert isinstance(figure, Figure)
    rcParams["svg.hashsalt"] = name  # ids that depend on the name alone
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(?<= )(width|height)="[0-9.]+pt" ?', "", svg[svg.index("<svg") :])
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"\s+", " ", svg)
    svg = re.sub(r"(\.\d\d)\d+(?=[^<>]*>)", r"\1", svg)  # hundredths of a point are enough, but not in texts
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for rank, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{rank})")
    return svg.replace(INK, "currentColor").strip()
