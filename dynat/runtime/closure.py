"""Code as a dependency by its meaning: what a stage imports, each module by the hash of its syntax tree.

A training costs days, and a reworded message must not repeat it. Comments, layout, docstrings and the texts
of errors, warnings and prints do not count; everything else does (docs/audit.md, "Code"). The module imports
none of the others, so that as a script it reads another tree: ``python -P closure.py FOLDER`` prints its
closures.
"""

import ast
import hashlib
import json
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grimp

STAGES = ("prepare", "import", "train", "attack", "autoattack", "tabulate")
PACKAGES = ("dynat", "stages")
# No byte of an output depends on these: a test swaps each for a stub and finds the same outputs.
EXCLUDED = ("dynat.runtime.tracking", "dynat.runtime.record", "dynat.runtime.progress")
MESSAGES = ("print", "warn")  # calls whose texts nobody computes with, like those of exceptions
Closure = dict[str, dict[str, str]]  # "modules": name -> hash of its syntax tree; "data": file -> SHA-256


def closure_file(stage: str) -> Path:
    """Where stage ``check`` keeps the closure of ``stage``, for DVC and Git to compare."""
    return Path("metrics", "code", f"{stage}.json")


def as_text(closure: Closure) -> str:
    """The content of that file."""
    return json.dumps(closure, indent=1) + "\n"


def code_key(stage: str) -> str:
    """MD5 of the closure file of ``stage`` for the code of this process, by which DVC knows it."""
    return hashlib.md5(as_text(closures()[stage]).encode(), usedforsecurity=False).hexdigest()


@cache
def closures() -> dict[str, Closure]:
    """Stage -> its closure, of the tree that ``import dynat`` finds."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=True)
    for name in EXCLUDED:
        if name in graph.modules:
            graph.remove_module(name)
    return {
        stage: _closure({script, *graph.find_upstream_modules(script)})
        for stage in STAGES
        if (script := f"stages.{stage}") in graph.modules
    }


def _closure(imported: set[str]) -> Closure:
    packages = {".".join(name.split(".")[:end]) for name in imported for end in range(1, name.count(".") + 1)}
    modules = {name: _hash_of(name) for name in imported | packages}
    found: dict[str, str] = {}
    for name in packages | imported:
        if _source(name).name == "__init__.py":
            found |= _package_data(name)
    return {"modules": dict(sorted(modules.items())), "data": dict(sorted(found.items()))}


@cache
def _hash_of(module: str) -> str:
    return module_hash(_source(module).read_text(encoding="utf-8"))


def _source(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _package_data(package: str) -> dict[str, str]:
    """Files of a package that are no code, such as templates, also in folders that are no package."""
    folder, found = _source(package).parent, {}
    waiting = [folder]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir() and path.name != "__pycache__" and not (path / "__init__.py").exists():
                waiting.append(path)
            elif path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith("."):
                name = f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# ------------------------------------------------------------------------------------------- syntax trees


def module_hash(source: str) -> str:
    """SHA-256 of the meaning of a module, the same from Python 3.11 on: its tree without texts for people."""
    return hashlib.sha256(tree_text(meaning(source)).encode()).hexdigest()


def meaning(source: str) -> ast.Module:
    """The syntax tree of a module without texts for people."""
    tree: ast.Module = _Blank().visit(ast.parse(source))
    return tree


class _Blank(ast.NodeTransformer):
    """Removes docstrings and blanks the texts of errors, warnings and prints."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if node.exc is not None:
            node.exc = _without_texts(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in MESSAGES or name.endswith("Error"):
            node.args = [_without_texts(each) for each in node.args]
            for keyword in node.keywords:
                keyword.value = _without_texts(keyword.value)
        return self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        # Python 3.12.1 ends the format of f"{x:{width}}" with an empty text
        node.values = [
            each for each in node.values if not (isinstance(each, ast.Constant) and not each.value)
        ]
        return self.generic_visit(node)


def _without_texts(expression: ast.expr) -> Any:
    class Texts(ast.NodeTransformer):
        def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
            return ast.Constant("")

        def visit_Constant(self, node: ast.Constant) -> ast.AST:
            return ast.Constant("") if isinstance(node.value, str) else node

    return Texts().visit(expression)


def tree_text(node: Any) -> str:
    """A tree as text without absent and empty fields, of which later versions of Python have more."""
    if isinstance(node, ast.Constant):
        return f"Constant({node.value!a})"
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({','.join(f'{name}={tree_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(tree_text, node))}]"
    return ascii(node)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(closures()))
