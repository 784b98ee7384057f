"""Archives nobody vouches for, read member by member: tar, zip or an unpacked folder.

Nothing is ever unpacked to disk, and every name, kind and size is checked before any content is read.
"""

import glob
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dynat.errors import UserError

MAX_MEMBER_BYTES = 1 << 28  # CIFAR-100's training batch has 1.5e8
BROKEN = (
    *(OSError, EOFError, ValueError, RuntimeError),  # RuntimeError: an encrypted or unsupported zip member
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Read = Callable[[], bytes]


@contextmanager
def opened(archive: Path) -> Iterator[dict[str, Read]]:
    """The files of ``archive`` in its own order: ``/``-separated relative name -> what reads the content.

    Raises ``UserError`` for ``..``, absolute names, links, devices, a name that comes twice or is too large,
    for what is no tar, zip or folder, and for content that cannot be read.
    """
    try:
        if archive.is_dir():  # the user's own: links are wanted
            names = glob.iglob("**", root_dir=archive, recursive=True, include_hidden=True)
            yield {name: (archive / name).read_bytes for name in names if (archive / name).is_file()}
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield _checked(archive, _zip_members(file))
        else:
            with tarfile.open(archive, "r:*") as file:
                yield _checked(archive, _tar_members(file))
    except BROKEN as error:
        why = " ".join(str(error).split()).partition(":")[0] or type(error).__name__
        raise UserError(f"{archive.name}: cannot be read as a folder, tar or zip: {why}") from error


Member = tuple[str, int, str, Read]  # name, bytes, kind, content


def _zip_members(file: zipfile.ZipFile) -> Iterator[Member]:
    for member in file.infolist():
        kind = "folder" if member.is_dir() else "file"
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "other"
        yield member.orig_filename, member.file_size, kind, partial(file.read, member)


def _tar_members(file: tarfile.TarFile) -> Iterator[Member]:
    def read(member: tarfile.TarInfo) -> bytes:
        stream = file.extractfile(member)
        return stream.read() if stream else b""

    for member in file:
        kind = "file" if member.isfile() else "folder" if member.isdir() else "other"
        yield member.name, member.size, kind, partial(read, member)


def _checked(archive: Path, members: Iterable[Member]) -> dict[str, Read]:
    """The regular files among ``members``; refuses what no data set needs."""
    files: dict[str, Read] = {}
    for name, size, kind, read in members:
        if kind == "other":
            raise UserError(f"{archive.name}: {name!r} is a link or device: refused")
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
            raise UserError(f"{archive.name}: member {name!r} points outside the archive: refused")
        name = "/".join(part for part in parts if part not in ("", "."))
        if name in files:
            raise UserError(f"{archive.name}: {name!r} is in it twice")
        if size > MAX_MEMBER_BYTES:
            raise UserError(f"{archive.name}: {name!r} has {size} bytes, more than {MAX_MEMBER_BYTES}")
        if kind == "file":
            files[name] = read
    return files
