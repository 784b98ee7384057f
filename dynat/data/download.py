"""Archives: found, verified and, where need be, downloaded.

An archive is trusted for its hash alone, never for where it lies. A file under its final name is either
verified or refused; a download that was interrupted waits beside it as ``<name>.part``.
"""

import hashlib
import os
import re
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfileobj
from urllib.parse import quote
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from dynat.config.network import Checkpoint
from dynat.config.params import DataSpec
from dynat.data.archives import opened
from dynat.errors import UserError
from dynat.runtime.files import explained

MIRROR = "DYNAT_DATA_MIRROR"
TIMEOUT = 30  # seconds without a byte
WEB = ("http://", "https://")
HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)


def fetch(name: str, md5: str | None, sha256: str | None, mirrors: list[str], destination: Path) -> Path:
    """Find the archive ``name``, verify it and return its path.

    Looked for in the folder or below the URL of ``DYNAT_DATA_MIRROR`` (relative to the DVC repository), at
    ``destination``, then below each of ``mirrors``. A folder's file, or a folder of that name, is verified
    and used where it lies. A download is resumed by HTTP Range. Raises ``UserError`` if no place has the
    archive, or if it differs from the hash (hexadecimal; without one nothing is downloaded).
    """
    expected = {algorithm: digest for algorithm, digest in (("md5", md5), ("sha256", sha256)) if digest}
    own, path, failures = _own_mirror(), _local(name, destination), list[str]()
    if own.startswith(WEB):
        mirrors = [own, *mirrors]
    if mirrors and not path.exists():
        if not expected:
            raise UserError(f"{name}: without md5 or sha256 it is not downloaded; give one, or set {MIRROR}")
        with explained(path):
            failures = _download([f"{url.rstrip('/')}/{quote(name)}" for url in mirrors], path, expected)
    if not path.exists():
        places = ", ".join([f"{MIRROR} ({own or 'unset'})", str(path), *failures])
        raise UserError(f"{name}: not found; looked in {places}; set {MIRROR} to a folder or URL with it")
    with explained(path):
        if mismatch := _mismatch(path, expected):
            raise UserError(f"{path}: {mismatch}; delete or replace it")
    return path


def kept(name: str) -> Path:
    """Where a download of the project goes: ``data/`` of the DVC repository, or of the current folder."""
    return Path(os.environ.get("DVC_ROOT", ""), "data", name)


def verify(spec: DataSpec, section: str) -> bool:
    """Hold the archive of ``spec`` against its hash; False if it is not at hand, for nothing is downloaded.

    Raises ``UserError``, which names ``section`` or its key, if it differs, and if an image folder has no
    ``sha256``: other images must be another lineage. The message has the value to write.
    """
    if spec.archive is None:
        return True
    path, found = _local(spec.archive, kept(spec.archive)), ""
    try:
        if spec.source == "image_folder" and not spec.sha256:
            found = f"sha256: {_hash(path, 'sha256')} is that of" if path.exists() else "not here:"
        elif path.exists():
            fetch(spec.archive, spec.md5, spec.sha256, [], path)
    except UserError as error:
        raise UserError(f"{section}.archive: {error}") from None
    if found:
        raise UserError(f"{section}.sha256: needed, for other images are other results; {found} {path}")
    return path.exists()


def weights(spec: Checkpoint, section: str) -> Path:
    """The file of ``spec``, verified, and downloaded if it has mirrors and is not at hand.

    Raises ``UserError``, which names a key of ``section``, as :func:`verify_weights` and :func:`fetch` do.
    """
    destination = _destination(spec, section)
    if spec.package and not destination.exists():
        raise UserError(f"{section}.file: {spec.file!r} is not in {spec.package!r} as installed here")
    verify_weights(spec, section)
    try:
        return fetch(spec.file, None, spec.sha256, spec.mirrors, destination)
    except UserError as error:
        raise UserError(f"{section}.file: {error}") from None


def module_file(spec: Checkpoint) -> Path | None:
    """The file of Python with the network of ``spec``; None if that is one of ours."""
    return Path(os.environ.get("DVC_ROOT", ""), spec.module.partition(":")[0]) if spec.module else None


def verify_weights(spec: Checkpoint, section: str) -> bool:
    """Hold the file and the module of ``spec`` against their hashes; False if the file is not at hand.

    Raises ``UserError``, which names a key of ``section``, if one differs or has no hash: other weights are
    another lineage. The message has the value to write.
    """
    if code := module_file(spec):
        if not code.is_file():
            raise UserError(f"{section}.module: {code} is not here")
        _refuse_unnamed(code, spec.module_sha256, f"{section}.module_sha256", "code")
        if mismatch := _mismatch(code, {"sha256": spec.module_sha256 or ""}):
            raise UserError(f"{section}.module_sha256: {code}: {mismatch}; write this one if it is meant")
    path = _local(spec.file, _destination(spec, section))
    _refuse_unnamed(path, spec.sha256, f"{section}.sha256", "weights")
    if not path.exists():
        return False
    if mismatch := _mismatch(path, {"sha256": spec.sha256 or ""}):
        raise UserError(f"{section}.file: {path}: {mismatch}; delete or replace it")
    return True


def _destination(spec: Checkpoint, section: str) -> Path:
    """Where the file of ``spec`` is, or would be brought to."""
    if spec.package is None:
        return kept("checkpoints") / spec.file
    found = find_spec(spec.package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{section}.package: {spec.package!r} is not installed here")
    return Path(found.submodule_search_locations[0], spec.file)


def _refuse_unnamed(path: Path, sha256: str | None, key: str, what: str) -> None:
    """Raise ``UserError`` without a hash, and with what to write, for other files are other results."""
    if not sha256:
        name = key.rpartition(".")[2]
        there = (
            f"{name}: {_hash(path, 'sha256')} is that of {path}" if path.exists() else f"{path} is not here"
        )
        raise UserError(f"{key}: needed, for other {what} are other results; {there}")


def folder_hash(folder: Path) -> str:
    """SHA-256 of a folder: of a line "<SHA-256>  <name>" for each file but litter, by name."""
    with opened(folder) as files:
        lines = [f"{hashlib.sha256(files[name]()).hexdigest()}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _own_mirror() -> str:
    return os.environ.get(MIRROR, "").strip()


def _local(name: str, destination: Path) -> Path:
    """Where the archive is, or where a download would bring it."""
    own = Path(os.environ.get("DVC_ROOT", ""), Path(_own_mirror()).expanduser(), name)
    return own if _own_mirror() and not _own_mirror().startswith(WEB) and own.exists() else destination


def _mismatch(path: Path, expected: dict[str, str]) -> str | None:
    """The first hash that differs, with size and kind of the file."""
    for algorithm, wanted in expected.items():
        if (found := _hash(path, algorithm)) != wanted:
            return f"expected {algorithm} {wanted}, found {found} ({_kind(path)})"
    return None


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder, which has a sha256 alone"
    with path.open("rb") as file:
        page = "; looks like an HTML page" if HTML.match(file.peek(512)) else ""
    return f"{path.stat().st_size} bytes{page}"


def _hash(path: Path, algorithm: str) -> str:
    if path.is_dir():
        return folder_hash(path)
    with path.open("rb") as file:
        new = partial(hashlib.new, algorithm, usedforsecurity=False)
        return hashlib.file_digest(file, new).hexdigest()


def _download(urls: list[str], destination: Path, expected: dict[str, str]) -> list[str]:
    """Bring the first of ``urls`` that delivers to ``destination``; returns those that do not, with why."""
    part, failures = destination.with_name(f"{destination.name}.part"), []
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):
        for url in urls:
            if destination.exists():  # since the URL before, or by another process meanwhile
                break
            if failure := _complete(part, url, expected):
                failures.append(f"{url} ({failure})")
            else:
                part.replace(destination)
    return failures


def _complete(part: Path, url: str, expected: dict[str, str]) -> str | None:
    """Make ``part`` whole and as expected, going on where it ends; otherwise say why the URL does not."""
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            _append(part, url, have)
        except (OSError, HTTPException, ValueError) as error:
            if part.exists() and part.stat().st_size > have:
                continue
            if not have or getattr(error, "code", None) != 416:  # 416: nothing lies beyond what is there
                kept = f"; {have} bytes are kept, run again to resume" if have else ""
                return (" ".join(str(error).split()) or type(error).__name__) + kept
        if not (mismatch := _mismatch(part, expected)):
            return None
        part.unlink()
        if not have:  # else what was there may have been the start of another file
            return mismatch


def _append(part: Path, url: str, start: int) -> None:
    """Bring the bytes from ``start`` on; a server that ignores Range sends all, which take their place."""
    if not url.startswith(WEB):
        raise ValueError("not an http(s) URL")
    headers = {"User-Agent": "dynat", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        start = start if response.status == 206 else 0
        if start == 0 and HTML.match(response.peek(512)):
            raise ValueError("an HTML page")
        mode = "ab" if start else "wb"
        with part.open(mode) as file, tqdm.wrapattr(file, "write", response.length, disable=None) as counted:
            copyfileobj(response, counted)
        if response.length:
            raise OSError(f"connection closed {response.length} bytes early")
