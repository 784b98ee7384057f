"""Files that survive a stop: written under a temporary name in their own folder, synced and renamed.

A kill between any two system calls leaves the old file or the new one.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dynat.errors import UserError

Value = TypeVar("Value")
ADVICE = {
    errno.ENOSPC: "free space on that disk and start again",
    errno.EDQUOT: "free some of your disk quota and start again",
    errno.EROFS: "work in a folder that can be written",
    errno.EACCES: "give yourself write permission there, or work in another folder",
}


def root() -> Path:
    """The user's repository, also in DVC's temporary workspaces."""
    return Path(os.environ.get("DVC_ROOT", "")).resolve()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was and raise :class:`UserError` (disk, rights)."""
    with atomic(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, keys in their order; a NaN or infinity in it is a :class:`UserError`."""
    _refuse_not_finite(path, value)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """Write ``rows`` as CSV, columns in order of appearance; a NaN or infinity is a :class:`UserError`."""
    _refuse_not_finite(path, rows)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read(root: Path, name: str, parse: Callable[[str], Value]) -> Value | None:
    """What ``parse`` makes of the text of ``root / name``, None if there is no such file.

    Raises :class:`UserError` where it cannot be read, or ``parse`` finds it broken (a ``ValueError``).
    """
    try:
        return parse((root / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: cannot be read ({reason}); restore it with git checkout or run dvc repro"
        ) from None


def read_json(root: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in ``root / name``, None if there is none; :class:`UserError` if it is broken."""

    def parse(text: str) -> dict[str, Any]:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it must hold a JSON object")
        return value

    return read(root, name, parse)


def read_csv(root: Path, name: str) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no such file."""
    return read(root, name, lambda text: list(csv.DictReader(io.StringIO(text)))) or []


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON, hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedRandom]:
    """A file to write that takes the place of ``path`` when the block ends, and only if nothing failed."""
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed process left of it is overwritten
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(folder)
        os.close(folder)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to fill that takes the place of ``folder`` when the block ends, if nothing failed."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explained(partial):
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a :class:`UserError` that names ``path`` and what to do."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "check that disk")
        raise UserError(f"{path}: {error.strerror or error}; {advice}") from error


def _refuse_not_finite(path: Path, value: Any, key: str = "") -> None:
    """Raise for the first NaN or infinity in nested dicts and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}: not written, {key} is {value}; find out why before a number is published")
    nested = value if isinstance(value, list | tuple) else ()
    for name, item in value.items() if isinstance(value, dict) else enumerate(nested):
        _refuse_not_finite(path, item, f"{key}.{name}" if key else str(name))
