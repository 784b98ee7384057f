"""Archives are read member by member; hostile or broken ones are refused before anything is read."""

import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_helpers import FOLDER, as_tar, as_zip, random, refused, small_set


@pytest.fixture(autouse=True)
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(folder))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


def special(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member


@pytest.mark.parametrize(
    "member",
    [
        special("../outside.png"),
        special("train/ant/../../../outside.png"),
        special("/outside.png"),
        special("train\\..\\outside.png"),
        special("C:/outside.png"),
        special("train/ant/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("train/ant/link.png", tarfile.SYMTYPE, "01.png"),
        special("train/ant/link.png", tarfile.LNKTYPE, "train/ant/01.png"),
        special("train/linked", tarfile.SYMTYPE, ".."),
        special("train/ant/fifo.png", tarfile.FIFOTYPE),
        special("train/ant/device.png", tarfile.CHRTYPE),
        special("train/ant/block.png", tarfile.BLKTYPE),
        special("../outside", tarfile.DIRTYPE),
        special("train/ant/01.png", size=3),
        special("./train/ant/01.png", size=3),
    ],
    ids=lambda member: f"{member.name} {member.type.decode()}",
)
def test_tar_with_a_hostile_member_is_refused_before_anything_is_read(
    tmp_path: Path, mirror: Path, member: tarfile.TarInfo
) -> None:
    files = {**small_set()[0], "train/ant/00.png": b"would be refused too, were it read"}
    as_tar(mirror / "a.tar.gz", files, member)
    message = refused(tmp_path, **FOLDER, archive="a.tar.gz")
    assert repr(member.name.removeprefix("./")) in message
    assert any(word in message for word in ("outside the archive", "link or device", "twice"))


def test_zip_with_a_hostile_member_is_refused(tmp_path: Path, mirror: Path) -> None:
    files = small_set()[0]
    for index, name in enumerate(("../outside.png", "/outside.png", "train/ant/..\\outside.png")):
        as_zip(mirror / f"{index}.zip", {**files, name: b""})
        assert "outside the archive" in refused(tmp_path, **FOLDER, archive=f"{index}.zip")
    link = zipfile.ZipInfo("train/ant/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    as_zip(mirror / "a.zip", files)
    with zipfile.ZipFile(mirror / "a.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "'train/ant/link.png' is a link" in refused(tmp_path, **FOLDER, archive="a.zip")


def test_member_that_claims_a_huge_size_is_refused_unread(tmp_path: Path, mirror: Path) -> None:
    as_tar(mirror / "a.tar", {})
    with tarfile.open(mirror / "a.tar", "w") as archive:
        archive.fileobj.write(special("train/ant/0.png", size=1 << 40).tobuf())  # type: ignore[union-attr]
    assert f"has {1 << 40} bytes" in refused(tmp_path, **FOLDER, archive="a.tar")


def test_zip_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path, mirror: Path) -> None:
    files = {**small_set()[0], "train/zebra/99.png": bytes(1 << 20)}
    raw = bytearray(as_zip(mirror / "a.zip", files).read_bytes())
    for start in (raw.rfind(b"PK\x03\x04") + 22, raw.rfind(b"PK\x01\x02") + 24):
        assert struct.unpack_from("<I", raw, start) == (1 << 20,)
        struct.pack_into("<I", raw, start, 100)
    (mirror / "a.zip").write_bytes(raw)
    assert "cannot be read" in refused(tmp_path, **FOLDER, archive="a.zip")


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x1f\x8b\x08\x00broken", b"PK\x03\x04broken"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, mirror: Path, content: bytes) -> None:
    (mirror / "a.tar.gz").write_bytes(content)
    assert refused(tmp_path, **FOLDER, archive="a.tar.gz").startswith("a.tar.gz: cannot be read as a folder")


def test_truncated_archive_without_a_hash_is_refused(tmp_path: Path, mirror: Path) -> None:
    archive = as_tar(mirror / "a.tar.gz", {**small_set()[0], "train/zebra/99.png": random.bytes(50_000)})
    archive.write_bytes(archive.read_bytes()[:-20_000])
    assert "cannot be read" in refused(tmp_path, **FOLDER, archive="a.tar.gz")
