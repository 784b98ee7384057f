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
    lines = text.splitlines(keepends=True)
    for node in reversed(list(ast.walk(ast.parse(text)))):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        for argument in node.exc.args:
            single = argument.lineno == argument.end_lineno
            if isinstance(argument, ast.Constant | ast.JoinedStr) and single:
                line = lines[argument.lineno - 1].encode()
                before, after = line[: argument.col_offset], line[argument.end_col_offset :]
                lines[argument.lineno - 1] = (before + b'f"in other words {1 + 1}"' + after).decode()
    return "".join(lines)


def cosmetic(text: str) -> str:
    """A comment, a docstring and reworded errors, in another layout."""
    parsed = ast.parse(reworded(text))
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is None:
            node.body.insert(0, ast.Expr(ast.Constant("A docstring.")))
    return f"# A comment.\n{ast.unparse(ast.fix_missing_locations(parsed))}\n"
