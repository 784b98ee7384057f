"""``metrics/report.html``: tables beside the published values, figures, and the source of every number.

One file from ``templates``; a number opens the sheet that says how it was counted. Its one script sorts,
filters and lays two methods side by side; without it the page is complete.
"""

import base64
import hashlib
import io
import re
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from dynat.errors import UserError
from dynat.paper.cells import name
from dynat.paper.measurements import CAVEATS, ELSEWHERE
from dynat.paper.published import TITLES
from dynat.paper.tabulation import SUMMARY, Tabulation

HYBRIDS = ("gairat", "dynat_gairat", "dynat_inner_gairat")  # of Figure 5
Pixels = NDArray[np.uint8]  # [C,H,W]


def render(found: Tabulation, root: Path = Path()) -> str:
    """The report; ``root`` holds data and witnesses for the images. Equal results give equal text."""
    sections = [{"id": s, "title": f"Setting {s}", **_figures(found, s, root)} for s in found.params.settings]
    sections += [{"id": f"table{number}", "title": title} for number, title in TITLES.items()]
    sections += [
        {"id": "claims", "title": "The paper's claims"},
        {"id": "pairs", "title": "Methods in pairs"},
    ]
    script = files(__package__).joinpath("templates/report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = templates().get_template("report.html")
    cells, pairs = found.cells.to_dict("index"), paired(found)
    return page.render(
        sections=sections, tables=found.tables, cells=cells, pairs=pairs, script=script, digest=digest
    )


def recounted(found: Tabulation) -> list[str]:
    """The parts of the report that come from verdicts alone: tables, the sheets of all cells, the pairs."""
    macros: Any = templates().get_template("macros.html").module
    tables, cells = map(macros.tables_of, found.tables.values()), found.cells.to_dict("index")
    return [str(part) for part in (*tables, macros.sheets(cells), macros.pairs_data(paired(found)))]


def paired(found: Tabulation) -> list[dict[str, Any]]:
    """What the page's script can lay side by side: a dictionary per setting and attack, of text alone.

    ``sheets`` maps each method to the id of the sheet with its accuracy. ``pairs`` are lists: both methods,
    their difference in points, the ends of its 95 % interval, p, p after Holm's correction, n.
    """
    ours = found.cells[found.cells["table"].isin(found.params.settings)]
    groups = []
    for (setting, column), own in found.compared.pairs.groupby(["setting", "column"], sort=False):
        cells = ours[(ours["setting"] == setting) & (ours["column"] == column)]
        pairs = [
            [each["first"], each["second"], f"{each['difference']:+z.2f}"]
            + [f"{each[end]:+z.1f}" for end in ("low", "high")]
            + [*(f"{each[p]:.2g}" for p in ("p", "holm")), str(each["n"])]
            for each in own.to_dict("records")
        ]
        sheets = {  # the mean over seeds comes last
            method: f"a-{slug(key)}" for method, key in zip(cells["method"], cells["cell"], strict=True)
        }
        groups.append({"setting": setting, "column": name(str(column)), "sheets": sheets, "pairs": pairs})
    return groups


@cache
def templates() -> Environment:
    """The templates of the pages, with their filters."""
    found = Environment(loader=PackageLoader("dynat.paper"), autoescape=True, undefined=StrictUndefined)
    found.trim_blocks = found.lstrip_blocks = True
    found.filters.update(slug=slug, name=name, quote=shlex.quote, data_uri=data_uri)
    found.policies["json.dumps_kwargs"] = {}  # keys in their order
    return found


def slug(key: str) -> str:
    """A cell's key as part of an HTML id."""
    return re.sub(r"[^\w.-]+", "-", key).strip("-")


def _figures(found: Tabulation, setting: str, root: Path) -> dict[str, Any]:
    """The figures of a setting as SVG, empty where nothing was run, their caveats, images of one method."""
    from dynat.paper import figures  # matplotlib, of which the audit needs nothing

    family = found.params.variants
    others = [method for method in found.params.methods(setting) if method not in family]
    results, cells = found.results, found.cells[found.cells["row"] == setting]
    histories, radii = (each[each["setting"] == setting] for each in (results.histories, results.radii))
    trained = [method for method in found.params.trained if method in histories["method"].array]
    rivals = [method for method in ("lbgat0", "lbgat6") if {method, "dynat"} <= {*trained}]
    means = cells.pivot(index="column", columns="method", values="mean").reindex(SUMMARY).astype(float)
    clean = cells[cells["column"] == "clean"].set_index("method")
    hybrids = means[[method for method in clean.index if method in HYBRIDS]].dropna()
    first = sorted((*family, *others), key=lambda method: method != "dynat")
    images = ((method, perturbed(root, setting, f"{method}/{found.params.seeds[0]}")) for method in first)
    drawn = results.measurements[results.measurements["setting"] == setting]
    drawn = drawn[(drawn["kind"] == "attack") | bool(hybrids.shape[1] > 1)]
    noted = drawn[["method", "caveats"]].explode("caveats").drop_duplicates()
    noted = noted[noted["caveats"].str.contains(ELSEWHERE) | noted["caveats"].isin(CAVEATS.values())]
    return {
        "marks": noted.groupby("caveats", sort=False)["method"].agg(", ".join).to_dict(),
        "rivals": rivals and figures.training(f"training-{setting}", histories, ["dynat", rivals[0]]),
        "trained": [figures.training(f"training-{setting}-{each}", histories, [each]) for each in trained],
        "clean": len(clean) and figures.intervals(f"clean-{setting}", clean, family, "clean accuracy, %"),
        "hybrids": hybrids.shape[1] > 1 and figures.bars(f"gairat-{setting}", hybrids.rename(index=name)),
        "radii": len(radii) and figures.against_epsilon(f"epsilon-{setting}", radii, {*others}),
        "n": " or ".join(map(str, sorted(radii["n"].unique()))),
        "several": radii["seed"].nunique() > 1,
        "broken": next((each for each in images if each[1]), None),
    }


def perturbed(root: Path, setting: str, run: str, attack: str = "pgd20") -> list[dict[str, Any]]:
    """The first six images that ``attack`` broke in ``run`` (such as ``dynat/0``), with index and label.

    :data:`Pixels` ``natural``, ``perturbed`` and ``difference``, amplified until the largest one of the image
    fills the range; grey means none. Empty where nothing was broken, or witness or data are not at hand;
    :class:`UserError` if they are unreadable.
    """
    witness = root / f"metrics/attack/{setting}/{run}.witness.safetensors"
    data = root / f"data/{setting}.safetensors"
    if not (witness.exists() and data.exists()):
        return []
    try:
        with safe_open(witness, framework="numpy") as file:
            if f"best/{attack}/indices" not in file.keys():  # noqa: SIM118  not a dict
                return []
            indices = file.get_tensor(f"best/{attack}/indices")[:6]
            images = file.get_slice(f"best/{attack}/images")[: len(indices)] if len(indices) else []
        with safe_open(data, framework="numpy") as file:
            naturals = [file.get_slice("test_images")[i : i + 1][0] for i in map(int, indices)]
            labels = file.get_tensor("test_labels")[indices]
    except (OSError, SafetensorError, IndexError) as error:
        raise UserError(f"{witness}: does not fit {data} ({error}); run dvc repro") from None
    found: list[dict[str, Any]] = []
    for index, label, natural, image in zip(indices, labels, naturals, images, strict=True):
        change = image - natural / np.float32(255)
        change = 0.5 + 0.5 * change / (float(np.abs(change).max()) or 1.0)
        grey = [(each * 255).round().clip(0, 255).astype(np.uint8) for each in (image, change)]
        three = {"natural": natural, "perturbed": grey[0], "difference": grey[1]}
        found.append({"index": int(index), "label": int(label), **three})
    return found


def data_uri(pixels: Pixels) -> str:
    """An image as a BMP data URI: uncompressed, so its bytes do not depend on a compressor's version."""
    channels = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(channels.transpose(1, 2, 0))).save(file, "BMP")
    return "data:image/bmp;base64," + base64.b64encode(file.getvalue()).decode()
