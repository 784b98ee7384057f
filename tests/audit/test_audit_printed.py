"""Every printed number is counted again: what was changed in text, entry, metric or file is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import COUNTS, files, params, put, write

from dynat.audit.link import Link
from dynat.audit.printed import Printed
from dynat.paper.report import render
from dynat.paper.tabulation import tabulate

SETTING = "cifar10_wrn34_10"
CELL = "table1/DYNAT/aa"
CELLS = "metrics/tables/cells.json"
UNION = f"metrics/autoattack/{SETTING}/dynat/0.json"


@pytest.fixture(scope="module")
def tabulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one method, one of another, tabulated; not to be changed."""
    folder = tmp_path_factory.mktemp("tabulated")
    chosen = params([], ["dynat", "dynat_awp"], (0, 1), (SETTING,))
    for seed in (0, 1):
        write(folder, "dynat", COUNTS, setting=SETTING, aa={40: 27 + seed}, seed=seed)
    write(folder, "dynat_awp", COUNTS, setting=SETTING)
    (folder / "params.yaml").write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    for name, text in files(chosen, folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "metrics/report.html").write_text(render(tabulate(chosen, folder), folder))
    return folder


@pytest.fixture
def root(tabulated: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(tabulated, tmp_path / "copy")


def faults(links: list[Link]) -> list[str]:
    return [link.line for link in links if link.state == "broken"]


def edited(root: Path, name: str, edit: Callable[[Any], None]) -> None:
    content = json.loads((root / name).read_text())
    edit(content)
    put(root / name, content)


def rewritten(root: Path, name: str, pattern: str, text: str) -> None:
    now, count = re.subn(pattern, text, (root / name).read_text(), count=1)
    assert count == 1
    (root / name).write_text(now)


def test_every_cell_and_table_holds_as_tabulated(root: Path) -> None:
    printed = Printed(root)
    assert {CELL, f"{SETTING}/dynat/0/aa", f"{SETTING}/dynat/mean/aa"} <= printed.cells.keys()
    assert faults([link for key in printed.cells for link in printed.check(key)] + printed.tables()) == []


def other_source(cells: dict[str, Any]) -> None:
    """Seed 1 passed off as seed 0, its own text and all."""
    cells[f"{SETTING}/dynat/0/aa"] = cells[f"{SETTING}/dynat/1/aa"]


def difference(cells: dict[str, Any]) -> None:
    cells[CELL]["difference"] = "+0.01"


def published(cells: dict[str, Any]) -> None:
    cells[CELL] |= {"published": "60.00", "difference": "+8.75"}


def rule(cells: dict[str, Any]) -> None:
    cells[CELL]["rule"] = "share"


def no_sources(cells: dict[str, Any]) -> None:
    del cells[CELL]["sources"]


@pytest.mark.parametrize(
    ("edit", "cell", "said"),
    [
        (other_source, f"{SETTING}/dynat/0/aa", "is not what the verdicts give"),
        (difference, CELL, "its difference is '+0.01', the verdicts give"),
        (published, CELL, "is not what the verdicts give"),
        (rule, CELL, "its rule is 'share', the verdicts give 'mean_sd'"),
        (no_sources, CELL, "unreadable (KeyError('sources'))"),
    ],
)
def test_a_changed_entry_of_cells_json_is_named(
    root: Path, edit: Callable[[Any], None], cell: str, said: str
) -> None:
    edited(root, CELLS, edit)
    found = faults(Printed(root).check(cell))
    assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("epsilon", 4 / 255, "params.yaml says"),
        ("attack_seed", 3, "attack_seed is 3, params.yaml says 0"),
    ],
)
def test_a_metric_of_another_attack_is_named(root: Path, key: str, value: float, said: str) -> None:
    edited(root, UNION, lambda metrics: metrics.update({key: value}))
    found = faults(Printed(root).check(CELL))
    assert any(line.startswith(f"✗ {UNION}: {key} is") and said in line for line in found), found


def test_a_metric_that_its_verdicts_do_not_count_is_named(root: Path) -> None:
    edited(root, UNION, lambda metrics: metrics["aa"]["n40"].update(accuracy=99.0))
    found = faults(Printed(root).check(CELL))
    assert any("/aa/n40/accuracy says 99.0, its verdicts count 67.5" in line for line in found), found


@pytest.mark.parametrize(
    ("name", "pattern", "text"),
    [
        ("metrics/tables/table1.md", "68.75", "88.75"),
        ("metrics/tables/table1.csv", "68.75", "88.75"),
        (f"metrics/tables/{SETTING}.csv", "68.75", "88.75"),
        ("metrics/report.html", r">68\.75</a>", ">88.75</a>"),
        ("metrics/report.html", "27 of 40 robust", "37 of 40 robust"),
        ("metrics/report.html", r'"dynat_awp", "\+0\.00"', '"dynat_awp", "+1.00"'),
    ],
)
def test_a_digit_changed_in_a_table_is_named(root: Path, name: str, pattern: str, text: str) -> None:
    rewritten(root, name, pattern, text)
    (fault,) = faults(Printed(root).tables())
    assert fault.startswith(f"✗ {name}: ")


def test_a_table_that_is_missing_or_of_no_stage_is_named(root: Path) -> None:
    (root / "metrics/tables/table1.md").rename(root / "metrics/tables/table9.md")
    assert faults(Printed(root).tables()) == [
        "✗ metrics/tables/table1.md: missing; run dvc repro tabulate",
        "✗ metrics/tables/table9.md: is nothing that tabulate writes; remove it, or run dvc repro",
    ]
