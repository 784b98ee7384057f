"""``metrics/report.html``: tables beside the published values, figures, and the source of every number.

One self-contained file without scripts; a number opens the sheet that says how it was counted. The page and
its words are in ``templates``.
"""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dynat.paper.cells import name
from dynat.paper.images import data_uri, perturbed
from dynat.paper.published import TITLES
from dynat.paper.tabulation import SUMMARY, Tabulation

HYBRIDS = ("gairat", "dynat_gairat", "dynat_inner_gairat")  # of Figure 5


def render(found: Tabulation, root: Path = Path()) -> str:
    """The report; ``root`` holds data and witnesses for the images. Equal results give equal text."""
    sections = [{"id": s, "title": f"Setting {s}", **_figures(found, s, root)} for s in found.params.settings]
    sections += [{"id": f"table{number}", "title": title} for number, title in TITLES.items()]
    page = _templates().get_template("report.html")
    return page.render(sections=sections, tables=found.tables, cells=found.cells.to_dict("index"))


def recounted(found: Tabulation) -> list[str]:
    """The parts of the report that come from verdicts alone: its tables and the sheets of all cells."""
    macros: Any = _templates().get_template("macros.html").module
    return [
        *map(str, map(macros.tables_of, found.tables.values())),
        str(macros.sheets(found.cells.to_dict("index"))),
    ]


@cache
def _templates() -> Environment:
    found = Environment(loader=PackageLoader("dynat.paper"), autoescape=True, undefined=StrictUndefined)
    found.trim_blocks = found.lstrip_blocks = True
    found.filters.update(slug=slug, name=name, quote=shlex.quote, data_uri=data_uri)
    return found


def slug(key: str) -> str:
    """A cell's key as part of an HTML id."""
    return re.sub(r"[^\w.-]+", "-", key).strip("-")


def _figures(found: Tabulation, setting: str, root: Path) -> dict[str, Any]:
    """The figures of a setting as SVG, empty where nothing was run, and the images of one method."""
    from dynat.paper import figures  # matplotlib, of which the audit needs nothing

    family, baselines = found.params.variants, found.params.baselines
    results, cells = found.results, found.cells[found.cells["row"] == setting]
    histories, radii = (each[each["setting"] == setting] for each in (results.histories, results.radii))
    trained = [method for method in (*baselines, *family) if method in histories["method"].array]
    rivals = [method for method in ("lbgat0", "lbgat6") if {method, "dynat"} <= {*trained}]
    means = cells.pivot(index="column", columns="method", values="mean").reindex(SUMMARY).astype(float)
    clean = cells[cells["column"] == "clean"].set_index("method")
    hybrids = means[[method for method in clean.index if method in HYBRIDS]].dropna()
    first = sorted((*family, *baselines), key=lambda method: method != "dynat")
    images = ((method, perturbed(root, setting, method, found.params.seeds[0])) for method in first)
    return {
        "rivals": rivals and figures.training(f"training-{setting}", histories, ["dynat", rivals[0]]),
        "trained": [figures.training(f"training-{setting}-{each}", histories, [each]) for each in trained],
        "clean": len(clean) and figures.intervals(f"clean-{setting}", clean, family, "clean accuracy, %"),
        "hybrids": hybrids.shape[1] > 1 and figures.bars(f"gairat-{setting}", hybrids.rename(index=name)),
        "radii": len(radii) and figures.against_epsilon(f"epsilon-{setting}", radii, {*baselines}),
        "n": " or ".join(map(str, sorted(radii["n"].unique()))),
        "several": radii["seed"].nunique() > 1,
        "broken": next((each for each in images if each[1]), None),
    }
