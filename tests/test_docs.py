"""What the pages say can be done is done: their commands and snippets run, their links lead somewhere."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pipelines import ROOT, choose, copy

PAGES = [
    "benchmarks/README.md",
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
FENCE = re.compile(r"^```(\w*) ?(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: ``sh`` is run; others are edits of ``place``, a file and perhaps a key in it."""

    language: str
    place: str
    text: str


def sections() -> dict[str, list[Block]]:
    """The blocks of docs/your-own.md by the heading above them."""
    _, *parts = re.split(r"^## ", read("docs/your-own.md"), flags=re.MULTILINE)
    return {part.partition("\n")[0]: [Block(*found) for found in FENCE.findall(part)] for part in parts}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --------------------------------------------------------------------- docs/your-own.md, step by step


@pytest.mark.slow
@pytest.mark.parametrize("section", sections())
def test_everything_in_a_section_of_your_own_works_as_it_stands(
    tmp_path: Path, quick_path: str, section: str
) -> None:
    folder = copy(tmp_path / "repository")
    choose(folder, {"baselines": []})  # the section's own method is enough
    (folder / ".git/info").mkdir(exist_ok=True)  # which a clone has
    blocks = sections()[section]
    assert {"sh", "yaml"} <= {block.language for block in blocks}
    for block in blocks:
        follow(block, folder, tmp_path, quick_path)
        shrink(folder / "params.yaml")
    cells = json.loads((folder / "metrics/tables/cells.json").read_text(encoding="utf-8"))
    assert {f"{MADE[section]}/{attack}" for attack in ("clean", "pgd20", "cw", "aa")} <= cells.keys()


MADE = {"A method": "digits/dynat_mart/0", "Data": "shapes/dynat/0", "A network": "digits/dynat/0"}


def follow(block: Block, folder: Path, scratch: Path, path: str) -> None:
    """Do what a block says, as a reader would."""
    if block.language == "sh":
        run(block.text, folder, scratch, path)
        return
    file, _, key = block.place.partition(" ")
    if block.language == "yaml":
        merge(folder / file, key, yaml.safe_load(block.text))
    elif block.language == "diff":
        apply(block.text, folder / file)
    else:
        assert block.language == "python"
        assert not (folder / file).exists(), "a block of Python is a file of its own"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(block.text, encoding="utf-8")


def run(commands: str, folder: Path, scratch: Path, path: str) -> None:
    """Run shell commands with the programs of ``path`` in place of those that ``uv run`` would find."""
    uv = scratch / "bin/uv"
    if not uv.exists():
        uv.parent.mkdir()
        uv.write_text('#!/bin/sh\n[ "$1" = run ] && shift && exec "$@"\n')
        uv.chmod(0o755)
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "PYTEST_"))
    }
    result = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        env={
            **kept,
            "PATH": f"{uv.parent}:{path}",
            "PYTHONPATH": str(folder),
        },  # this copy, not what is installed
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, commands + result.stdout + result.stderr


def merge(file: Path, key: str, values: dict[str, Any]) -> None:
    """Add entries below ``key``, such as ``study.digits``, of a YAML file, or replace them."""
    whole = yaml.safe_load(file.read_text(encoding="utf-8"))
    section = whole
    for name in filter(None, key.split(".")):
        section = section[name]
    section |= values
    file.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")


def apply(diff: str, file: Path) -> None:
    """Replace the old lines of each hunk, which must stand in the file just once, by its new ones."""
    text = file.read_text(encoding="utf-8")
    for hunk in filter(None, diff.split("@@\n")):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] or "\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert text.count(old) == 1, f"{file.name} has these lines {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


SHORT = {
    "train": {"epochs": 1, "steps": 2},
    "attack": {"pgd": [10, 20], "apgd_steps": 5},
    "autoattack": {"n": [4]},
}


def shrink(file: Path) -> None:
    """Make a study that the page added as short as the copy's own."""
    study = yaml.safe_load(file.read_text(encoding="utf-8"))["study"]
    if "shapes" in study:
        for key, values in SHORT.items():
            merge(file, f"study.shapes.{key}", values)


def test_the_example_of_attacking_a_network_from_python_prints_what_the_page_says() -> None:
    found = doctest.testfile(str(ROOT / "docs/checkpoints.md"), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0


# --------------------------------------------------------------------- what pages say of the repository


LINKS = [
    (page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", read(page)) if "://" not in link
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_within_the_repository_leads_somewhere(page: str, link: str) -> None:
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_a_page_names_is_there(page: str) -> None:
    named = re.findall(r"`((?:dynat|stages|tests|docs|benchmarks|metrics/tables)/[\w./]*)`", read(page))
    own = {block.place for blocks in sections().values() for block in blocks if block.language == "python"}
    assert [name for name in named if not (ROOT / name).exists() and name not in own] == []


def test_the_audit_has_every_option_that_the_pages_name() -> None:
    command = [sys.executable, "-m", "dynat.audit", "--help"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for page in PAGES for line in read(page).splitlines() if "-m dynat.audit" in line]
    named = {option for line in lines for option in re.findall(r" (--[a-z]+)", line.partition("#")[0])}
    assert {option for option in named if option not in known} == set() != named


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 110


def test_every_section_of_methods_that_the_code_cites_is_there() -> None:
    page = read("docs/methods.md")
    numbers = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", page, re.MULTILINE))
    sources = [
        path for top in ("dynat", "stages", "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")
    ]
    cited = {
        (path.name, number)
        for path in sources
        for cites in re.findall(
            r"methods\.md,? (?:sections? )?([\d.,\- ]+(?:and [\d.]+)?)", path.read_text("utf-8")
        )
        for number in re.findall(r"\d+(?:\.\d+)?", cites)
    }
    assert len(numbers) > 16
    assert {each for each in cited if each[1] not in numbers} == set()


def test_every_recipe_has_its_place_in_methods() -> None:
    recipes = yaml.safe_load(read("params.yaml"))["recipes"]
    assert [name for name in recipes if f"`{name}`" not in read("docs/methods.md")] == []


def test_every_equation_that_the_code_cites_is_in_methods() -> None:
    table = {int(number) for number in re.findall(r"^\| (\d) \|", read("docs/methods.md"), re.MULTILINE)}
    files = [ROOT / "params.yaml", *(ROOT / "dynat").rglob("*.py")]
    cited = {int(number) for file in files for number in re.findall(r"Eq\. (\d)", file.read_text("utf-8"))}
    assert cited <= table == set(range(1, 8))
