"""Archives: found, verified and, where need be, downloaded.

An archive is trusted for its hash alone, never for where it lies. A file under its final name is either
verified or refused; a download that was interrupted waits beside it as ``<name>.part``.
"""

import fcntl
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from tqdm import tqdm

from dynat.errors import UserError

MIRROR = "DYNAT_DATA_MIRROR"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20
HEAD = 512  # bytes that are looked at before any is kept
INTERRUPTIONS = 20  # after so many the next mirror is asked


class _UnavailableError(Exception):
    """A mirror could not deliver; the text says why."""


def fetch(name: str, md5: str | None, sha256: str | None, mirrors: Sequence[str], destination: Path) -> Path:
    """Find the archive ``name``, verify it and return its path.

    Looked for in the folder or below the URL of ``DYNAT_DATA_MIRROR`` (relative to the DVC repository), at
    ``destination``, then below each of ``mirrors``. A folder's file is verified and used where it lies; a
    folder of that name is returned as it is. A download is resumed by HTTP Range. Raises ``UserError`` if
    no place has the archive, or if it differs from the hash (hexadecimal; without one nothing is downloaded).
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"archive {name!r} must be a plain file name; say where it lies with {MIRROR}")
    expected = {algorithm: digest for algorithm, digest in (("md5", md5), ("sha256", sha256)) if digest}
    own, bases, looked = os.environ.get(MIRROR, "").strip(), list(mirrors), []
    if _is_url(own):
        bases.insert(0, own)
    else:
        found = Path(os.environ.get("DVC_ROOT", ""), Path(own).expanduser(), name) if own else None
        if found and found.exists():
            return _verified(found, expected)
        state = (
            " (unset)"
            if found is None
            else f"={own}" + ("" if found.parent.is_dir() else " (no such folder)")
        )
        looked.append(MIRROR + state)
    try:
        if not destination.exists():
            looked.append(str(destination))
            _download(name, expected, bases, destination, looked)
        return _verified(destination, expected)
    except OSError as error:
        raise UserError(f"{destination}: {error.strerror or error}") from error


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _verified(path: Path, expected: Mapping[str, str]) -> Path:
    if path.is_dir():
        if expected:
            raise UserError(f"{path} is a folder, which has no {' or '.join(expected)}; set it to null")
        return path
    try:
        with path.open("rb") as file:
            problem = _mismatch(file, expected)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if problem:
        raise UserError(f"{path}: {problem}; delete or replace it")
    return path


def _mismatch(file: BinaryIO, expected: Mapping[str, str]) -> str | None:
    """What differs from the expected hashes, with size and kind, or None."""
    digests = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in expected}
    head, size = b"", 0
    while chunk := file.read(CHUNK):
        head, size = head or chunk[:HEAD], size + len(chunk)
        for digest in digests.values():
            digest.update(chunk)
    for algorithm, wanted in expected.items():
        if (found := digests[algorithm].hexdigest()) != wanted.lower():
            kind = "; looks like an HTML page" if _is_html(head) else ""
            return f"expected {algorithm} {wanted}, found {found} ({size} bytes{kind})"
    return None


def _is_html(head: bytes) -> bool:
    return (
        re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", head, re.IGNORECASE) is not None
    )


def _download(
    name: str, expected: Mapping[str, str], bases: Sequence[str], destination: Path, looked: list[str]
) -> None:
    """Put the verified archive at ``destination``, or raise ``UserError`` that lists every place tried."""
    if bases and not expected:
        raise UserError(f"{name}: without md5 or sha256 it is not downloaded; give one, or set {MIRROR}")
    part = destination.with_name(destination.name + ".part")
    if bases:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            for base in bases:
                if destination.exists():  # another process was faster
                    return
                url = f"{base.rstrip('/')}/{quote(name)}"
                problem = _from_mirror(url, part, expected) if _is_url(base) else "not an http(s) URL"
                if problem is None:
                    os.replace(part, destination)
                    return
                looked.append(f"{url} ({problem})")
    rest = f"; {part} is kept, run again to resume" if part.exists() else ""
    raise UserError(
        f"{name}: not found; looked in {', '.join(looked)}; set {MIRROR} to a folder or URL with it{rest}"
    )


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Let one process at a time write ``part``; the lock ends with its process, however that ends."""
    with part.with_name(part.name + ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to download {part.stem}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _from_mirror(url: str, part: Path, expected: Mapping[str, str]) -> str | None:
    """Bring ``part`` to its verified end; returns None, or why this mirror did not help."""
    own = not part.exists()  # a part begun elsewhere may be the start of another file
    for _ in range(INTERRUPTIONS):
        before = _size(part)
        try:
            _transfer(url, part, expected)
        except _UnavailableError as error:
            if _size(part) > before:
                continue
            return str(error)
        with part.open("rb") as file:
            problem = _mismatch(file, expected)
            os.fsync(file.fileno())
        if problem is None:
            return None
        part.unlink()
        if own:
            return problem
        own = True
    return f"interrupted {INTERRUPTIONS} times"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path, expected: Mapping[str, str]) -> None:
    """Append what is missing to ``part``; returns once the server says that nothing is.

    Raises ``_UnavailableError`` for the network's faults and ``OSError`` for the disk's. What is in ``part``
    is never cut: a server that ignores Range has its first bytes skipped.
    """
    have = _size(part)
    headers = {"User-Agent": "dynat", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing lies beyond what we have
            return
        raise _UnavailableError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise _UnavailableError(_reason(error)) from error
    with response:
        start = 0
        if response.status == 206:
            start = have
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise _UnavailableError("answered with another range than asked")
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        head = _read(response, HEAD)
        if start == 0 and _is_html(head):
            page = _mismatch(io.BytesIO(head + _read(response, CHUNK)), expected)
            raise _UnavailableError(page or "an HTML page")
        _append(response, head, part, start, have, total)


def _append(
    response: HTTPResponse, head: bytes, part: Path, start: int, have: int, total: int | None
) -> None:
    """Write the stream, whose first byte is byte ``start`` of the file, behind the first ``have`` bytes."""
    url, position, chunk = response.url, start, head
    print(f"downloading {url}" + (f" from byte {have}" if have else ""), file=sys.stderr, flush=True)
    with (
        part.open("ab") as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while chunk:
            file.write(chunk[max(0, have - position) :])
            position += len(chunk)
            bar.update(len(chunk))
            chunk = _read(response, CHUNK, at_once=True)
    if total is not None and position < total:
        raise _UnavailableError(f"connection closed after {position} of {total} bytes")


def _read(response: HTTPResponse, count: int, at_once: bool = False) -> bytes:
    """Up to ``count`` bytes: what has arrived (``at_once``), or all of them unless the stream ends."""
    try:
        return response.read1(count) if at_once else response.read(count)
    except (OSError, HTTPException) as error:
        raise _UnavailableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    inner = error.reason if isinstance(error, URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__
