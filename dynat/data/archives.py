"""The files of an archive that nobody vouches for: a tar, a zip or an unpacked folder.

Nothing is unpacked to disk, so no name or link of a member can reach anything outside of the archive.
"""

import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dynat.errors import UserError

LITTER = re.compile(  # what systems and people leave beside images: never read, and in no hash
    r"(.*/)?(\..*|(__MACOSX|@eaDir)/.*|(eh)?thumbs\.db|desktop\.ini|icon\r|(readme|licen[cs]e)(\.(txt|md))?)",
    re.IGNORECASE,
)
Files = Mapping[str, Callable[[], bytes]]  # name from the top with /, in the archive's order -> its content
BROKEN = (
    *(OSError, EOFError, ValueError, RuntimeError),  # RuntimeError: an encrypted or unsupported zip member
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


@contextmanager
def opened(archive: Path) -> Iterator[Files]:
    """The files of ``archive`` but litter.

    Raises ``UserError``, also as they are read, if it cannot be read as one.
    """
    try:
        if archive.is_dir():
            yield _kept({name: (archive / name).read_bytes for name in _walk(archive)})
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:  # some programs write the separator of Windows
                names = {name.replace("\\", "/"): name for name in file.namelist()}
                files = {name: partial(file.read, names[name]) for name in names if not name.endswith("/")}
                yield _kept(files)
        else:
            with tarfile.open(archive) as tar:
                members = [member for member in tar if not member.isdir()]
                yield _kept({each.name.removeprefix("./"): partial(_content, tar, each) for each in members})
    except BROKEN as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read as a folder, tar or zip: {why}") from error


def _kept(files: Files) -> Files:
    return {name: content for name, content in files.items() if not LITTER.fullmatch(name)}


def _walk(folder: Path) -> Iterator[str]:
    """The names of all files below ``folder``, also of folders that are links."""
    for top, folders, names in os.walk(folder, followlinks=True):
        for path in (Path(top, name) for name in (*folders, *names)):
            name, within = path.relative_to(folder).as_posix(), Path(top).resolve()
            if path.is_symlink() and (not path.exists() or path.resolve() in (within, *within.parents)):
                raise UserError(f"{name!r} is a link to nothing or to a folder around it; remove it")
            if path.is_file():
                yield name


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with suppress(KeyError):  # a link to what is not in the archive
        if stream := tar.extractfile(member):
            return stream.read()
    raise UserError(f"{member.name!r} is a device, or a link to what is not in the archive")
