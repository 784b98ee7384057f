"""Archives: found, verified and, where need be, downloaded.

An archive is trusted for its hash alone, never for where it lies. A file under its final name is either
verified or refused; a download that was interrupted waits beside it as ``<name>.part``.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from dynat.errors import UserError
from dynat.runtime.files import explained

MIRROR = "DYNAT_DATA_MIRROR"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20
ATTEMPTS = 20  # after so many interruptions the next mirror is asked
WEB = ("http://", "https://")
HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)


class _MirrorError(Exception):
    """A mirror could not deliver; the text says why."""


class _MismatchError(Exception):
    """A file is not the one that is wanted; the text says why."""


def fetch(name: str, md5: str | None, sha256: str | None, mirrors: Sequence[str], destination: Path) -> Path:
    """Find the archive ``name``, verify it and return its path.

    Looked for in the folder or below the URL of ``DYNAT_DATA_MIRROR`` (relative to the DVC repository), at
    ``destination``, then below each of ``mirrors``. A folder's file is verified and used where it lies; a
    folder of that name is returned as it is. A download is resumed by HTTP Range. Raises ``UserError`` if
    no place has the archive, or if it differs from the hash (hexadecimal; without one nothing is downloaded).
    """
    expected = {algorithm: digest for algorithm, digest in (("md5", md5), ("sha256", sha256)) if digest}
    own, looked = os.environ.get(MIRROR, "").strip(), f"{MIRROR} (unset)"
    if own.startswith(WEB):
        mirrors, looked = [own, *mirrors], f"{MIRROR}={own}"
    elif own:
        folder = Path(os.environ.get("DVC_ROOT", ""), Path(own).expanduser())
        if (folder / name).exists():
            return _verified(folder / name, expected)
        looked = f"{MIRROR}={own}" + ("" if folder.is_dir() else " (no such folder)")
    places = [looked, str(destination)]
    part = _part(destination)
    if mirrors and not destination.exists():
        if not expected:
            raise UserError(f"{name}: without md5 or sha256 it is not downloaded; give one, or set {MIRROR}")
        with explained(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{part}.lock"):
                urls = (f"{base.rstrip('/')}/{quote(name)}" for base in mirrors)
                places += _download(urls, destination, expected)
    if destination.exists():
        return _verified(destination, expected)
    kept = f"; {part} is kept, run again to resume" if part.exists() else ""
    raise UserError(
        f"{name}: not found; looked in {', '.join(places)}; set {MIRROR} to a folder or URL with it{kept}"
    )


def _part(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.part")


def _verified(path: Path, expected: Mapping[str, str]) -> Path:
    if path.is_dir() and expected:
        raise UserError(f"{path} is a folder, which has no {' or '.join(expected)}; set it to null")
    try:
        with explained(path):
            _check(path, expected)
    except _MismatchError as error:
        raise UserError(f"{path}: {error}; delete or replace it") from None
    return path


def _check(path: Path, expected: Mapping[str, str]) -> None:
    """Raise ``_MismatchError`` if a hash differs from the expected one; names size and kind too."""
    for algorithm, wanted in expected.items():
        with path.open("rb") as file:
            kind = "; looks like an HTML page" if HTML.match(file.peek(512)) else ""
            digest = hashlib.file_digest(file, partial(hashlib.new, algorithm, usedforsecurity=False))
        if (found := digest.hexdigest()) != wanted.lower():
            size = path.stat().st_size
            raise _MismatchError(f"expected {algorithm} {wanted}, found {found} ({size} bytes{kind})")


def _download(urls: Iterable[str], destination: Path, expected: Mapping[str, str]) -> list[str]:
    """Bring the first of ``urls`` that delivers to ``destination``; returns those that do not, with why."""
    part, failed = _part(destination), list[str]()
    for url in urls:
        again, reason = True, ""
        for _ in range(ATTEMPTS):
            if destination.exists():  # by another process while this one waited
                return failed
            have = part.stat().st_size if part.exists() else 0
            try:
                for chunk in _body(url, have):
                    with part.open("ab") as file:
                        file.write(chunk)
                with part.open("ab") as file:  # an empty answer has made none
                    os.fsync(file.fileno())
                _check(part, expected)
                part.replace(destination)
            except _MirrorError as error:
                again, reason = part.exists() and part.stat().st_size > have, str(error)
            except _MismatchError as error:
                part.unlink()
                again, reason = have > 0, str(error)  # what was there may be the start of another file
            if not again:
                break
        failed.append(f"{url} ({reason})")
    return failed


def _body(url: str, start: int) -> Iterator[bytes]:
    """The bytes from ``start`` on; of a server that ignores Range the first ones are skipped."""
    if not url.startswith(WEB):
        raise _MirrorError("not an http(s) URL")
    headers = {"User-Agent": "dynat", "Accept-Encoding": "identity"}
    try:
        request = Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
        with urlopen(request, timeout=TIMEOUT) as response:
            position = start if response.status == 206 else 0
            length = response.headers.get("Content-Length", "")
            total = position + int(length) if length.isdigit() else None
            print(f"downloading {url} from byte {start}", file=sys.stderr, flush=True)
            with tqdm(total=total, initial=position, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read1(CHUNK):
                    if start and position == 0 and HTML.match(chunk):
                        raise _MirrorError("an HTML page")
                    yield chunk[max(0, start - position) :]
                    position += len(chunk)
                    bar.update(len(chunk))
            if total is not None and position < total:
                raise _MirrorError(f"connection closed after {position} of {total} bytes")
    except HTTPError as error:
        error.close()
        if error.code != 416 or not start:  # 416: nothing lies beyond what we have
            raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _MirrorError(" ".join(str(reason).split()) or type(error).__name__) from error
