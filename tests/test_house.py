"""The rooms: who may import whom, how long things are, which words are used. See CONTRIBUTING.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.api import read_configuration
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"
LINES = {  # of *.py at most; a number here goes up only with what a user gets for it
    "stages": 320,
    "dynat/audit": 1265,
    "dynat/fleet": 1540,
    "dynat/accept": 555,
    "dynat/publish": 740,
    "dynat/paper": 1770,
    "dynat/evaluation": 1035,
    "dynat/methods": 1445,
    "dynat/networks": 790,
    "dynat/data": 660,
    "dynat/runtime": 1415,
    "dynat/config": 1000,
    "dynat/cost.py": 195,
    "dynat/errors.py": 10,
}
PRIVATE = re.compile(  # words that this project once had for itself
    r"(?:^|_)(courier|battery|assess|assessment|pieces?|told|heard|hear|leads?|follows?|shown|meant)(?:_|$)"
)


def modules(*rooms: str) -> list[Path]:
    found = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert found
    return found


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_a_room_imports_only_rooms_below_it() -> None:
    assert lint_imports(str(PROJECT), no_cache=True) == EXIT_STATUS_SUCCESS, "see what it prints"


def test_the_order_of_the_rooms_has_every_room() -> None:
    (contract,) = read_configuration(str(PROJECT))["contracts_options"]
    rooms = {room for layer in contract["layers"] for room in layer.replace(" ", "").split("|")}
    packages = {f"dynat.{path.parent.name}" for path in (ROOT / "dynat").glob("*/__init__.py")}
    assert rooms == packages | {"stages", "dynat.cost", "dynat.errors"}
    assert {name.removesuffix(".py").replace("/", ".") for name in LINES} == rooms


@pytest.mark.parametrize("room", LINES)
def test_a_room_keeps_to_its_lines(room: str) -> None:
    paths = [ROOT / room] if room.endswith(".py") else modules(room)
    assert sum(map(lines, paths)) <= LINES[room]


def test_all_rooms_together_keep_to_theirs() -> None:
    sizes = {path: lines(path) for path in modules("dynat", "stages")}
    core = ("config", "data", "networks", "methods", "evaluation")
    assert sum(sizes.values()) <= 12710
    assert sum(size for path, size in sizes.items() if path.relative_to(ROOT).parts[1] in core) <= 4930


def test_no_module_is_longer_than_330_lines_and_no_function_than_50() -> None:
    long = [path.name for path in modules("dynat", "stages") if lines(path) > 330]
    for path in modules("dynat", "stages"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 50:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


def names(tree: ast.AST) -> Iterator[str]:
    """Every name that a module gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.asname or ""


def words(name: str) -> str:
    """``_shareOfPieces`` -> ``_share_of_pieces``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize("path", modules("dynat", "stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_those_of_the_field(path: Path) -> None:
    found = {path.stem, *names(ast.parse(path.read_text(encoding="utf-8")))}
    assert {name for name in found if PRIVATE.search(words(name))} == set()


def test_there_is_one_reader_of_yaml_no_daemon_and_no_markup_in_python() -> None:
    sources = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in modules("dynat", "stages")
    }
    readers = [
        name for name, text in sources.items() if re.search(r"^ *(import|from) (ruamel\.)?yaml\b", text, re.M)
    ]
    assert readers == ["dynat/config/yaml_files.py"]
    for name, text in sources.items():
        assert not re.search(r"start_new_session|os\.setsid|daemonize", text), name
        assert not re.search(r"</(a|p|td|th|tr|div|span|table|section|figure|svg|h\d|li)>", text), name
