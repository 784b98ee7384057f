"""Archives nobody vouches for, read member by member: tar, zip or an unpacked folder.

Nothing is ever unpacked to disk, and every name, kind and size is checked before any content is read.
"""

import hashlib
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from dynat.errors import UserError

MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 1 << 28  # CIFAR-100's training batch has 1.5e8
BROKEN = (
    *(OSError, EOFError, ValueError, RuntimeError),  # RuntimeError: an encrypted or unsupported zip member
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Entry = tuple[str, int, Callable[[], bytes]]  # name, size in bytes, content


def listing(archive: Path) -> list[str]:
    """The names of all files in ``archive``, ``/``-separated and relative, in its own order.

    Raises ``UserError`` for ``..``, absolute names, links, devices, a name that comes twice, too many or too
    large members, and for what is no tar, zip or folder.
    """
    names: dict[str, None] = {}
    for name, size, _ in _entries(archive):
        if name in names:
            raise UserError(f"{archive.name}: {name!r} is in it twice")
        if size > MAX_MEMBER_BYTES:
            raise UserError(f"{archive.name}: {name!r} has {size} bytes, more than {MAX_MEMBER_BYTES}")
        if len(names) == MAX_MEMBERS:
            raise UserError(f"{archive.name}: more than {MAX_MEMBERS} members")
        names[name] = None
    return list(names)


def contents(archive: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the ``wanted`` members, in the order of an archive that ``listing`` accepted."""
    for name, _, read in _entries(archive):
        if name in wanted:
            try:
                content = read()
            except BROKEN as error:
                raise _unreadable(archive, error) from error
            yield name, content


def sha256(archive: Path) -> str | None:
    """The SHA-256 of an archive; None for a folder."""
    if archive.is_dir():
        return None
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(archive: Path, error: Exception) -> UserError:
    why = " ".join(str(error).split()).partition(":")[0] or type(error).__name__
    return UserError(f"{archive.name}: cannot be read as a folder, tar or zip: {why}")


def _entries(archive: Path) -> Iterator[Entry]:
    """The regular files of ``archive``, nothing read yet; refuses what no data set needs."""
    try:
        if archive.is_dir():
            yield from _folder(archive)
        elif zipfile.is_zipfile(archive):
            yield from _zip(archive)
        else:
            yield from _tar(archive)
    except BROKEN as error:
        raise _unreadable(archive, error) from error


def _folder(archive: Path) -> Iterator[Entry]:
    for folder, folders, names in os.walk(archive, followlinks=True):  # the user's own links are wanted
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            yield path.relative_to(archive).as_posix(), path.stat().st_size, path.read_bytes


def _zip(archive: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{archive.name}: {member.filename!r} is a link or device: refused")
            name = _relative(archive, member.orig_filename)
            if not member.is_dir():
                yield name, member.file_size, partial(_zip_content, file, member)


def _zip_content(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with file.open(member) as stream:
        content = stream.read(member.file_size)  # no more than the header says, whatever it unpacks to
    if len(content) != member.file_size:
        raise zipfile.BadZipFile(f"{member.filename} is cut short")
    return content


def _tar(archive: Path) -> Iterator[Entry]:
    with tarfile.open(archive, "r:*") as file:
        for member in file:
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise UserError(f"{archive.name}: {member.name!r} is a link or device: refused")
            name = _relative(archive, member.name)
            if member.isreg():
                yield name, member.size, partial(_tar_content, file, member)


def _tar_content(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = file.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return content


def _relative(archive: Path, name: str) -> str:
    """``name`` without ``./``; refuses what could point outside the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise UserError(f"{archive.name}: member {name!r} points outside the archive: refused")
    return "/".join(part for part in parts if part not in ("", "."))
