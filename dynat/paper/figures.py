"""Figures as SVG text: the same bytes for the same numbers, legible on light and on dark ground.

Text and axes take the colour of the page (``currentColor``), lines the page's ``--c0`` to ``--c5``; text
stays text, in the page's font.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from statistics import fmean
from typing import Any, TypeVar

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#0a0b0c"  # stands for currentColor until the SVG is written
COLOURS = ("#0000c0", "#0000c1", "#0000c2", "#0000c3", "#0000c4", "#0000c5")  # stand for --c0 to --c5
MARKERS = ("", "o", "s", "^")  # of the curves for which no colour is left
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}
Figures = TypeVar("Figures", bound=Callable[..., str])
History = Sequence[Mapping[str, str]]  # rows of history.csv


def _styled(draw: Figures) -> Figures:
    """Draw in this module's style, with ids that depend on the figure's name, the first argument."""

    @wraps(draw)
    def styled(name: str, *args: object) -> str:
        with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
            return draw(name, *args)

    return styled  # type: ignore[return-value]


@_styled
def training(name: str, methods: Mapping[str, Sequence[History]]) -> str:
    """Training and test accuracy (percent) per epoch, Figure 3; a method may have several seeds.

    A single method gets a small panel, with its accuracy under PGD on held-out images.
    """
    single = len(methods) == 1
    axes = _axes(2.6 if single else 4.6, 2.1)
    curves = {"training": ("train_clean", "--", 0), "test": ("test_clean", "-", 0)}
    if single:
        curves["held-out, PGD"] = ("validation_robust", ":", 1)
    for rank, (method, seeds) in enumerate(methods.items()):
        for first, history in zip((True, *[False] * len(seeds)), seeds, strict=False):
            for label, (column, line, colour) in curves.items():
                points = [(int(row["epoch"]), float(row[column])) for row in history if row.get(column)]
                shown = (label if single else f"{method}, {label}") if first and points else None
                axes.plot(*zip(*points, strict=True), line, color=COLOURS[rank + colour], lw=1.2, label=shown)
    axes.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best" if single else "lower right", fontsize=8)
    if single:
        axes.set_title(next(iter(methods)), fontsize=9)
    return _svg(axes, name)


@_styled
def intervals(name: str, rows: Sequence[tuple[str, float, float, float, int]], label: str) -> str:
    """A dot and its interval per row (name, value, low, high, colour), first row on top. Figure 4."""
    axes = _axes(4.6, 0.7 + 0.24 * len(rows), 0.2 + 0.075 * max(len(row[0]) for row in rows))
    places = range(len(rows), 0, -1)
    for place, (_, value, low, high, colour) in zip(places, rows, strict=True):
        axes.plot([low, high], [place, place], color=COLOURS[colour], lw=2, alpha=0.5)
        axes.plot([value], [place], "o", color=COLOURS[colour], ms=5)
        axes.annotate(
            f"{value:.2f}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.set(xlabel=label, ylim=(0.4, len(rows) + 0.6))
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    return _svg(axes, name)


@_styled
def bars(name: str, columns: Sequence[str], methods: Mapping[str, Sequence[float]]) -> str:
    """Accuracy (percent) of each method under each attack, side by side. Figure 5."""
    axes = _axes(4.6, 2.4)
    width = 0.8 / len(methods)
    for rank, (method, values) in enumerate(methods.items()):
        places = [place + (rank + 0.5) * width - 0.4 for place in range(len(columns))]
        drawn = axes.bar(places, values, width * 0.92, color=COLOURS[rank], label=method)
        axes.bar_label(drawn, [f"{value:.2f}" for value in values], fontsize=6, padding=1)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set(ylabel="accuracy, %", ylim=(0, 105))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, ncols=len(methods))
    return _svg(axes, name)


@_styled
def against_epsilon(
    name: str, curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], dashed: set[str]
) -> str:
    """Accuracy (percent) against epsilon, a method's mean over its seeds; the ``dashed`` ones are baselines.

    The last point, at 1, where every image is in the ball, is left to the sanity checks.
    """
    axes = _axes(4.6, 3.0)
    used = {True: 0, False: 0}
    for method, seeds in curves.items():
        turn, place = divmod(used[method in dashed], len(COLOURS))
        colour, marker = COLOURS[place], MARKERS[turn % len(MARKERS)]
        used[method in dashed] += 1
        line = "--" if method in dashed else "-"
        found: dict[float, list[float]] = {}
        for epsilon, value in (point for curve in seeds for point in curve[:-1]):
            found.setdefault(epsilon, []).append(value)
        means = [fmean(found[epsilon]) for epsilon in sorted(found)]
        axes.plot(sorted(found), means, line, marker=marker, ms=3, color=colour, lw=1.2, label=method)
    axes.set(xlabel="ε", ylabel="accuracy, %", ylim=(0, 102))
    axes.legend(fontsize=7, ncols=1 + (len(curves) > 8), loc="upper right")
    return _svg(axes, name)


def _axes(width: float, height: float, left: float = 0.5) -> Axes:
    """The axes of an empty figure; size in inches, ``left`` what the labels there need."""
    margins = {
        "left": left / width,
        "right": 1 - 0.1 / width,
        "bottom": 0.45 / height,
        "top": 1 - 0.25 / height,
    }
    return Figure(figsize=(width, height)).subplots(gridspec_kw=margins)


def _svg(axes: Axes, name: str) -> str:
    """The figure as an inline SVG element whose ids begin with ``name``."""
    text, figure = io.StringIO(), axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= )(width|height)="[0-9.]+pt" ?', "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", svg))  # hundredths of a point are enough
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for rank, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{rank})")
    return svg.replace(INK, "currentColor").strip()
