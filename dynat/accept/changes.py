"""Which functions an edit changed, and which of them were executed."""

import ast
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dynat.runtime.closure import meaning, tree_text


class Unit(NamedTuple):
    """A function, or what a name is bound to when its module is imported."""

    text: str  # its syntax tree
    lines: range  # of a function
    names: frozenset[str]  # that a function mentions; that an import binds, with a dot if in a class


def unproved(
    before: Mapping[str, str], after: Mapping[str, str], executed: Mapping[str, set[int]]
) -> list[str]:
    """Functions of ``after`` (module -> source) that changed since ``before`` and of which no line ran.

    ``executed`` has the lines that ran, by module. What runs at import proves nothing of what it binds: in
    its place stand the functions that mention such a name. A new function is judged by those that call it.
    """
    old, new = _units(before), _units(after)
    changed = [
        key for key in {*old, *new} if not (key in old and key in new and old[key].text == new[key].text)
    ]
    units = [units[key] for key in changed for units in (old, new) if key in units]
    bound = {name for unit in units if not unit.lines for name in unit.names}
    touched = [
        key for key in {*old} & {*new} if new[key].lines and (key in changed or new[key].names & bound)
    ]
    idle = [key for key in touched if not executed.get(key[0], set()) & {*new[key].lines}]
    return sorted(f"{module}: {function}" for module, function in idle)


def _units(sources: Mapping[str, str]) -> dict[tuple[str, str], Unit]:
    return {
        (module, name): unit
        for module, text in sources.items()
        for name, unit in _walk(meaning(text).body, "")
    }


def _walk(body: list[ast.stmt], scope: str) -> Iterator[tuple[str, Unit]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield f"{scope}{node.name}", Unit(tree_text(node), lines, frozenset(_mentioned(node)))
        elif isinstance(node, ast.ClassDef):
            head = [*node.bases, *node.keywords, *node.decorator_list]
            yield f"{scope}{node.name} =", Unit(tree_text(head), range(0), frozenset([node.name]))
            yield from _walk(node.body, f"{scope}{node.name}.")
        else:
            for name, text in _bound(node):
                names = frozenset([f".{name}" if scope else name])
                yield f"{scope}{name} =", Unit(text, range(0), names)


def _bound(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Names that a statement gives a value to at import, and what it says of them."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        origin = getattr(node, "module", "")
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], f"{origin} {tree_text(alias)}"
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            yield each.id, tree_text(node)


def _mentioned(node: ast.AST) -> Iterator[str]:
    """Names that a function reads; with a dot before them what may be the field of a class."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield from (each.attr, f".{each.attr}")
        elif isinstance(each, ast.keyword) and each.arg:
            yield f".{each.arg}"
