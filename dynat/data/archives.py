"""The files of an archive that nobody vouches for: a tar, a zip or an unpacked folder.

Nothing is unpacked to disk, so no name or link of a member can reach anything outside of the archive.
"""

import glob
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dynat.errors import UserError

Files = Mapping[str, Callable[[], bytes]]  # name from the top with /, in the archive's order -> its content
BROKEN = (
    *(OSError, EOFError, ValueError, RuntimeError),  # RuntimeError: an encrypted or unsupported zip member
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


@contextmanager
def opened(archive: Path) -> Iterator[Files]:
    """The files of ``archive``. Raises ``UserError``, also as they are read, if it cannot be read as one."""
    try:
        if archive.is_dir():
            names = glob.iglob("**", root_dir=archive, recursive=True)
            yield {name: (archive / name).read_bytes for name in names if (archive / name).is_file()}
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield {name: partial(file.read, name) for name in file.namelist() if not name.endswith("/")}
        else:
            with tarfile.open(archive) as tar:
                members = [member for member in tar if not member.isdir()]
                yield {member.name.removeprefix("./"): partial(_content, tar, member) for member in members}
    except BROKEN as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read as a folder, tar or zip: {why}") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with suppress(KeyError):  # a link to what is not in the archive
        if stream := tar.extractfile(member):
            return stream.read()
    raise UserError(f"{member.name!r} is a device, or a link to what is not in the archive")
