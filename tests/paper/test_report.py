"""The report: one file without network, the same bytes each time, every number with its source."""

import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic import COUNTS, files, history, params, put, records, write

from dynat.paper.report import data_uri, perturbed, recounted, render, slug
from dynat.paper.tabulation import tabulate

BASELINES, VARIANTS = ["trades", "gairat", "lbgat0"], ["dynat", "dynat_inner_gairat"]


class Page(HTMLParser):
    """Ids, links, loaded resources, tags and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action"):
                self.resources.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def fill(root: Path, warning: str = "zero gradient") -> None:
    """Results of every method but trades, histories, an epsilon curve, data and a witness."""
    for method in (*BASELINES[1:], *VARIANTS):
        write(root, method, COUNTS, last=4, aa={40: 27}, autoattack={"warnings": [warning]})
        history(root, method)
    curve = {"checks": {}, "epsilon_curve": [[0, 97.0], [0.1, 40.5]], "n": 100, "model_sha256": "dynat-0"}
    put(root / "metrics/sanity/toy/dynat/0.json", curve)
    images = np.arange(10 * 3 * 8 * 8, dtype=np.int64).reshape(10, 3, 8, 8) % 251
    (root / "data").mkdir()
    natural = {"test_images": images.astype(np.uint8), "test_labels": np.arange(10)}
    save_file(natural, root / "data/toy.safetensors")
    broken = np.array([2, 5])
    adversarial = (images[broken] / 255 + 8 / 255).clip(0, 1).astype(np.float32)
    witness = {"best/pgd20/indices": broken, "best/pgd20/images": adversarial}
    save_file(witness, root / "metrics/attack/toy/dynat/0.witness.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled folder."""
    root = tmp_path_factory.mktemp("results")
    fill(root)
    return root


@pytest.fixture(scope="module")
def report(results: Path) -> str:
    """Its report."""
    return render(tabulate(params(BASELINES, VARIANTS), results), results)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs_but_the_one_script(report: str) -> None:
    page = Page(report)
    assert not page.tags & {"link", "iframe", "object", "embed", "form", "base"}
    scripts = re.findall(r"<script(.*?)>(.*?)</script>", report, flags=re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="pairs-data"', ""]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*);", report) == [f"'sha256-{digest}'"]
    assert all(each.startswith(("data:image/bmp;base64,", "#")) for each in page.resources)
    assert not re.search(r"@import|url\((?!#)|\son\w+=", report)
    assert "default-src 'none'" in report
    assert len(report.encode()) < 3_000_000


def test_ids_are_unique_and_every_link_leads_somewhere(report: str, results: Path) -> None:
    page = Page(report)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        elif link != "runs/cost.html" and not link.startswith("https://arxiv.org/"):  # made by hand
            assert (results / "metrics" / link).is_file(), link
    for used in re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', report):
        assert used in page.ids


def test_every_number_opens_a_sheet_with_its_counts_and_command(report: str, results: Path) -> None:
    found = tabulate(params(BASELINES, VARIANTS), results)
    shown = [
        e.key for tables in found.tables.values() for t in tables for row in t.rows for e in row if e.key
    ]
    assert len(shown) == 4 * (10 + 2)
    sheet = r'<section class="audit" id="([^"]+)".*?>(.*?)</section>'
    sheets = dict(re.findall(sheet, report, flags=re.DOTALL))
    assert sheets.keys() == {f"a-{slug(key)}" for key in found.cells.index}  # also of a number in a CSV alone
    assert len(sheets) == len(found.cells) > len(shown)
    for key in shown:
        assert f'<td id="n-{slug(key)}"><a href="#a-{slug(key)}">' in report
    for sheet in sheets.values():
        key = re.findall(r"<h4>(.*?)</h4>", sheet)[0]
        command = re.findall(r"<pre>(.*?)</pre>", sheet)[0]
        assert shlex.split(command) == ["uv", "run", "python", "-m", "dynat.audit", key]
        assert found.cells.at[key, "text"] in sheet
    assert "27 of 40 robust to AutoAttack" in sheets["a-toy-dynat-0-aa"]
    assert "metrics/autoattack/toy/dynat/0.verdicts.json" in sheets["a-toy-dynat-0-aa"]
    assert "74 of 100 robust to PGD-20" in sheets["a-toy-dynat-0-pgd20"]


def test_pairs_in_the_page_are_those_of_the_file_and_open_the_mean_over_seeds(tmp_path: Path) -> None:
    chosen = params(["trades"], ["dynat"], (0, 1))
    for seed, method in product((0, 1), ("trades", "dynat")):
        counts = COUNTS | {"pgd20": 60 + seed + len(method)}
        write(tmp_path, method, counts, seed=seed, aa={40: 27})
    page = render(tabulate(chosen, tmp_path), tmp_path)
    (text,) = re.findall(r'id="pairs-data">(.*?)</script>', page, flags=re.DOTALL)
    groups, rows = json.loads(text), records(files(chosen, tmp_path)["metrics/tables/pairs.csv"])
    assert [each["column"] for each in groups][:4] == ["Clean", "FGSM", "PGD-10", "PGD-20"]
    assert groups[3]["sheets"] == {each: f"a-toy-{each}-mean-pgd20" for each in ("trades", "dynat")}
    assert {sheet for each in groups for sheet in each["sheets"].values()} <= {*Page(page).ids}
    for group, row in zip(groups, rows, strict=True):
        ((first, second, *numbers),) = group["pairs"]
        assert (first, second) == (row["first"], row["second"])
        points, rest = numbers[:3], numbers[3:]
        wanted = [float(row[name]) for name in ("difference", "low", "high")]
        assert [float(each) for each in points] == pytest.approx(wanted, abs=0.051)
        assert [float(each) for each in rest] == pytest.approx(
            [float(row[n]) for n in ("p", "holm", "n")], 0.05
        )


def test_published_values_and_rows_not_run_are_there(report: str) -> None:
    text = " ".join(Page(report).text)
    for published in ("89.16", "60.89", "62.30", "49.90"):
        assert published in text
    assert "trades" in text
    assert "arXiv:2408.13102" in text
    assert "CITATION.cff" in text


def test_figures_of_the_paper_are_drawn_from_what_was_run(report: str, tmp_path: Path) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", report)
    for words in (
        "DYNAT against LBGAT",
        "Clean accuracy",
        "GAIRAT against",
        "radius of PGD-20",
        "PGD-20 makes dynat",
    ):
        assert sum(words in caption for caption in captions) == 1, words
    empty = render(tabulate(params(["trades"], ["dynat"]), tmp_path), tmp_path)
    assert "<figure>" not in empty


def test_what_figures_show_in_less_than_float32_is_said_below_them(tmp_path: Path) -> None:
    write(tmp_path, "dynat", COUNTS, attack={"trained_in": "bf16", "precision": "tf32"})
    write(tmp_path, "trades", COUNTS, attack={"trained_in": "bf16"})
    made = render(tabulate(params(["trades"], ["dynat"]), tmp_path), tmp_path)
    said = re.findall(r"<p>In these figures: (.*?) \((.*?)\)\.</p>", made)
    assert [(text.split(",")[0], methods) for text, methods in said] == [
        ("trained in bf16", "trades, dynat"),
        ("attack crafted in TF32", "dynat"),
    ]


def test_figures_take_their_colours_from_the_page(report: str) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", report, flags=re.DOTALL))
    assert "currentColor" in svg
    assert "var(--c0)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}\b|black|white", svg)
    assert "prefers-color-scheme: dark" in report


def test_text_from_results_is_escaped(tmp_path: Path) -> None:
    fill(tmp_path, warning="<script>alert(1)</script>")
    text = "".join(recounted(tabulate(params(BASELINES, VARIANTS), tmp_path)))
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert re.findall("<script.*?>", text) == ['<script type="application/json" id="pairs-data">']


def test_images_are_those_of_data_and_witness(results: Path) -> None:
    first, second = perturbed(results, "toy", "dynat/0")
    assert [(each["index"], each["label"]) for each in (first, second)] == [(2, 2), (5, 5)]
    expected = np.arange(10 * 3 * 8 * 8).reshape(10, 3, 8, 8)[2] % 251
    assert (first["natural"] == expected).all()
    assert (first["perturbed"] == np.minimum(expected + 8, 255)).all()
    assert first["difference"].max() == 255  # all of it points up: grey plus the whole upper half
    assert first["difference"].min() >= 127


def test_an_attack_that_broke_nothing_has_no_images(tmp_path: Path) -> None:
    fill(tmp_path)
    none = {
        "best/pgd20/indices": np.zeros(0, np.int64),
        "best/pgd20/images": np.zeros((0, 3, 8, 8), np.float32),
    }
    save_file(none, tmp_path / "metrics/attack/toy/dynat/0.witness.safetensors")
    assert perturbed(tmp_path, "toy", "dynat/0") == []
    assert perturbed(tmp_path, "toy", "dynat/0", attack="pgd7") == []


def test_bitmap_holds_the_pixels_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(
        0, 256, (3, 5, 4), dtype=np.uint8
    )  # rows of 12 bytes: no padding
    data = base64.b64decode(data_uri(pixels).partition(",")[2])
    offset = int.from_bytes(data[10:14], "little")
    rows = np.frombuffer(data[offset:], np.uint8).reshape(5, 4, 3)[::-1, :, ::-1]  # bottom row first, BGR
    assert (rows.transpose(2, 0, 1) == pixels).all()


def test_everything_is_the_same_to_the_byte_in_another_process_and_needs_no_torch(
    report: str, results: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "import dynat.audit.printed, stages.tabulate, synthetic\n"
        "assert not {'torch', 'mlflow', 'matplotlib'} & sys.modules.keys()\n"
        f"found = stages.tabulate.tabulate(synthetic.params({BASELINES}, {VARIANTS}), Path(sys.argv[1]))\n"
        "files = stages.tabulate.text_files(found)\n"
        "files['metrics/report.html'] = stages.tabulate.render(found, Path(sys.argv[1]))\n"
        "assert not {'torch', 'mlflow'} & sys.modules.keys()\n"
        "import json; print(json.dumps(files))"
    )
    command = [sys.executable, "-c", program, str(results), str(Path(__file__).parents[1])]
    env = {"PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo", "PYTHONPATH": str(Path(__file__).parents[2])}
    again = subprocess.run(command, check=True, capture_output=True, env=env, text=True)
    here = files(params(BASELINES, VARIANTS), results) | {"metrics/report.html": report}
    assert json.loads(again.stdout) == here
