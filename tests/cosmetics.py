"""Edits of source files, some of which change what people read and nothing else."""

import ast
from collections.abc import Callable
from pathlib import Path


def edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text(encoding="utf-8")
    new = change(text)
    assert new != text, path
    path.write_text(new, encoding="utf-8")


def reworded(text: str) -> str:
    """Every text literal directly inside a raised error said otherwise."""
    raised = [node.exc for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise)]
    texts = [
        argument
        for error in raised
        for argument in (error.args if isinstance(error, ast.Call) else ())
        if isinstance(argument, ast.Constant | ast.JoinedStr) and argument.lineno == argument.end_lineno
    ]
    lines = text.splitlines(keepends=True)
    for each in sorted(texts, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        line = lines[each.lineno - 1].encode()
        before, after = line[: each.col_offset], line[each.end_col_offset :]
        lines[each.lineno - 1] = (before + b'f"in other words {1 + 1}"' + after).decode()
    return "".join(lines)


def cosmetic(text: str) -> str:
    """A comment, a docstring and reworded errors, in another layout."""
    parsed = ast.parse(reworded(text))
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is None:
            node.body.insert(0, ast.Expr(ast.Constant("A docstring.")))
    return f"# A comment.\n{ast.unparse(ast.fix_missing_locations(parsed))}\n"
