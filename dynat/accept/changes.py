"""Which functions an edit changed, and which of them were executed."""

import ast
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dynat.runtime.closure import meaning, tree_text


class Unit(NamedTuple):
    """A function, or a statement that is executed when its module is imported."""

    text: str  # its syntax tree
    lines: range  # of a function
    names: frozenset[str]  # that a function mentions; to which a statement gives a value


def unproved(
    before: Mapping[str, str], after: Mapping[str, str], executed: Mapping[str, set[int]]
) -> list[str]:
    """Functions of ``after`` (module -> source) that changed since ``before`` and of which no line ran.

    ``executed`` has the lines that ran, by module. What runs at import proves nothing of what it binds: in
    its place stand the functions that mention such a name. A new function is judged by those that call it.
    """
    old, new = _units(before), _units(after)
    texts = [{key: unit.text for key, unit in units.items()} for units in (old, new)]
    changed = {key for key, _ in texts[0].items() ^ texts[1].items()}
    units = [units[key] for key in changed for units in (old, new) if key in units]
    bound = {name for unit in units if not unit.lines for name in unit.names}
    return sorted(
        f"{module}: {name}"
        for (module, name), unit in new.items()
        if unit.lines and (module, name) in old
        if (module, name) in changed or unit.names & bound
        if not executed.get(module, set()) & {*unit.lines}
    )


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
            head = tree_text([*node.bases, *node.keywords, *node.decorator_list])
            yield f"{scope}{node.name} =", Unit(head, range(0), frozenset([node.name]))
            yield from _walk(node.body, f"{scope}{node.name}.")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                text = f"from {getattr(node, 'module', '')} import {ast.unparse(alias)}"
                name = alias.asname or alias.name.partition(".")[0]
                yield f"{scope}{text}", Unit(text, range(0), frozenset([name]))
        else:
            each = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            stored = frozenset(name.id for name in each if isinstance(name.ctx, ast.Store))
            yield f"{scope}{tree_text(node)}", Unit(tree_text(node), range(0), stored)


def _mentioned(node: ast.AST) -> Iterator[str]:
    """Names, attributes and arguments' names in a function."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.keyword) and each.arg:
            yield each.arg
