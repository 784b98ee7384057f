"""Code counts by its meaning: what changes nothing that a stage computes leaves its closure as it was."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cosmetics import cosmetic, edit

from dynat.runtime.closure import EXCLUDED, STAGES, closures, module_hash

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "dynat/runtime/closure.py"
ROOMS = sorted(path.parent.name for path in (ROOT / "dynat").glob("*/__init__.py"))
Closures = dict[str, dict[str, dict[str, str]]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code."""
    for name in ("dynat", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def of(tree: Path) -> Closures:
    """The closures of a tree other than this one."""
    command = [sys.executable, "-P", str(SCRIPT), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return dict(json.loads(done.stdout))


def changed(before: Closures, after: Closures) -> set[str]:
    return {stage for stage in STAGES if before[stage] != after[stage]}


# ------------------------------------------------------------------------------- what belongs to a closure


def imports(path: Path) -> Iterator[str]:
    """Names of modules that a file may import, read from its statements; those for annotations left out."""
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(parsed):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()), None)


def reachable(name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        if module in found or module in EXCLUDED or path is None or module.split(".")[0] not in STAGES_AND_US:
            continue
        found.add(module)
        waiting += [*imports(path), module.rpartition(".")[0]]
    return found


STAGES_AND_US = ("dynat", "stages")


@pytest.mark.parametrize("stage", STAGES)
def test_a_closure_is_what_the_import_statements_reach(stage: str) -> None:
    assert {*closures()[stage]["modules"]} == reachable(f"stages.{stage}")


def test_a_closure_holds_the_data_of_its_packages() -> None:
    tabulate = closures()["tabulate"]["data"]
    assert {"dynat/paper/published/tables.csv", "dynat/paper/published/notes.csv"} <= {*tabulate}
    assert any(name.endswith(".css") for name in tabulate)
    assert closures()["train"]["data"] == {}


def test_the_committed_files_are_those_of_the_code() -> None:
    for stage in STAGES:
        text = (ROOT / "metrics/code" / f"{stage}.json").read_text(encoding="utf-8")
        assert json.loads(text) == closures()[stage], f"{stage}: run dvc repro check"


def test_an_import_added_to_a_module_is_in_the_closure_by_itself(tree: Path) -> None:
    (tree / "dynat/methods/added.py").write_text("VALUE = 1\n")
    edit(tree / "dynat/methods/objectives.py", lambda text: f"{text}\n\nfrom dynat.methods import added\n")
    found = of(tree)
    assert [stage for stage in STAGES if "dynat.methods.added" in found[stage]["modules"]] == ["train"]


# ------------------------------------------------------------------------------- what does not count


def test_comments_docstrings_error_texts_and_layout_of_every_module_leave_all_closures_alone(
    tree: Path,
) -> None:
    files = [path for path in (tree / "dynat").rglob("*.py") if path.stat().st_size]
    assert {path.relative_to(tree / "dynat").parts[0] for path in files} >= {*ROOMS}
    for path in [*files, *(tree / "stages").glob("[a-z]*.py")]:
        edit(path, cosmetic)
    assert of(tree) == closures()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("raise ValueError(f'no {x}')", "raise ValueError('never ' 'ever')"),
        ("y = CustomError(f'{x} is wrong', key='a')", "y = CustomError('wrong', key='b')"),
        ("print(f'{x:.2f}', file=err)", "print('x is', file=err)"),
        ("warnings.warn('old')", "warnings.warn('new')"),
        ("def f():\n 'says'\n return 1", "def f():\n    return 1"),
        ("class A:\n x: int\n 'a field'", "class A:\n x: int"),
    ],
)
def test_a_text_for_people_does_not_count(before: str, after: str) -> None:
    assert module_hash(before) == module_hash(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("raise ValueError('a')", "raise TypeError('a')"),
        ("raise ValueError(1)", "raise ValueError(2)"),
        ("print(f(1))", "print(f(2))"),
        ("print('a', file=err)", "print('a')"),
        ("warnings.append('old')", "warnings.append('new')"),
        ("x = 'text'", "x = 'Text'"),
        ("x = f'{a}'", "x = f'{a:.2f}'"),
        ("x = 1", "x = 1.0"),
        ("x = None", "x = 'None'"),
        ("{**a}", "{None: a}"),
        ("def f(x=None): pass", "def f(x): pass"),
        ("x: int = 1", "x: float = 1"),
        ("a = 1; b = 2", "b = 2; a = 1"),
    ],
)
def test_everything_else_counts(before: str, after: str) -> None:
    assert module_hash(before) != module_hash(after)


# ------------------------------------------------------------------------------- which stages an edit reaches


def constant(text: str) -> str:
    return text.replace("1.0001 -", "1.0002 -")


def test_a_constant_of_the_objectives_reaches_the_training_and_not_the_data(tree: Path) -> None:
    edit(tree / "dynat/methods/objectives.py", constant)
    assert changed(closures(), of(tree)) == {"train"}


def test_a_published_value_reaches_the_tables_alone(tree: Path) -> None:
    edit(tree / "dynat/paper/published/tables.csv", lambda text: text.replace("85.17", "85.18"))
    assert changed(closures(), of(tree)) == {"tabulate"}


# ------------------------------------------------------------------------------- the same on every Python


def interpreter(version: str) -> str:
    """A Python of that version on this machine."""
    homes = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    known = [shutil.which(f"python{version}"), *map(str, homes)]
    for each in filter(None, known):
        if subprocess.run([each, "-c", ""], capture_output=True).returncode == 0:
            return each
    found = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no Python {version} on this machine")
    return found.stdout.strip()


HARD = """
from __future__ import annotations
x = f"{1:{2}}a{3!r:>{4}.{5}f}" "b" f"{6}" + f'{x=}' + "é\\U0001F600\\u0378"
def f(a, /, b=1, *c, d: int = None, **e) -> None:
    match a:
        case {"k": None, **rest}: return {**rest, None: ...}
        case [1, *_] | (2 as z): raise ValueError(f"{a} {b:{c}}") from None
    try: lambda *, q=1: q
    except* OSError: assert a, "m"
    async def g(): return [x async for x in y if (w := 1)]
    return 1e400, 1j, b"\\xff", 1_000, 0x10, -0.0, f"{'nested'!s}", f"{{}}", f"{a:}"
@dec(1)
class A(B, metaclass=C):
    y: int
"""


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_supported_python_hashes_alike(version: str, tmp_path: Path) -> None:
    hard = tmp_path / "hard.py"
    hard.write_text(HARD, encoding="utf-8")
    files = [hard, *(p for room in ("dynat", "stages") for p in sorted((ROOT / room).rglob("*.py")))]
    program = (
        # grimp is one of this Python's packages
        "import sys, types; sys.modules['grimp'] = types.ModuleType('grimp')\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "from closure import module_hash\n"
        "for name in sys.argv[1:]: print(module_hash(open(name, encoding='utf-8').read()))"
    )
    command = [interpreter(version), "-c", program, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [module_hash(path.read_text(encoding="utf-8")) for path in files]
