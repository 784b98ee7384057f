"""Archives are read member by member and never unpacked; broken ones are refused."""

import shutil
import struct
import tarfile
from pathlib import Path

import pytest
from source_helpers import FOLDER, as_set, as_tar, as_zip, prepared, random, refused, small_set


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


OUTSIDE = [
    special("../outside.png"),
    special("/outside.png"),
    special("../outside", tarfile.DIRTYPE),
    special("C:/outside.png"),
    special("outside", tarfile.SYMTYPE, "/etc"),
    special("outside/passwd"),
    special("fifo", tarfile.FIFOTYPE),
]


def test_members_outside_of_the_layout_are_never_read_or_written(tmp_path: Path, mirror: Path) -> None:
    files, expected = small_set()
    as_tar(mirror / "a.tar.gz", files, *OUTSIDE)
    as_zip(mirror / "a.zip", {**files, "../outside.png": b"", "/outside.png": b"", "..\\outside.png": b""})
    before = sorted(tmp_path.rglob("*"))
    for name in ("a.tar.gz", "a.zip"):
        found = prepared(tmp_path, **FOLDER, archive=name)
        assert as_set(found["train_images"], found["train_labels"]) == as_set(
            expected["train_images"], expected["train_labels"]
        )
        shutil.rmtree(tmp_path / "prepared")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (
            special("train/ant/link.png", tarfile.SYMTYPE, "/etc/passwd"),
            "a link to what is not in the archive",
        ),
        (
            special("train/ant/link.png", tarfile.LNKTYPE, "../../secret"),
            "a link to what is not in the archive",
        ),
        (special("train/ant/fifo.png", tarfile.FIFOTYPE), "is a device"),
        (special("train/ant/device.png", tarfile.CHRTYPE), "is a device"),
        (special("train/linked", tarfile.SYMTYPE, ".."), "is not train/<class>/<image>"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name} {value.type.decode()}",
)
def test_member_of_the_layout_that_is_no_image_is_refused(
    tmp_path: Path, mirror: Path, member: tarfile.TarInfo, why: str
) -> None:
    as_tar(mirror / "a.tar.gz", small_set()[0], member)
    message = refused(tmp_path, **FOLDER, archive="a.tar.gz")
    assert member.name in message
    assert why in message


def test_link_within_the_archive_is_its_target(tmp_path: Path, mirror: Path) -> None:
    files, expected = small_set()
    as_tar(mirror / "a.tar.gz", files, special("train/ant/99.png", tarfile.SYMTYPE, "01.png"))
    found = prepared(tmp_path, **FOLDER, archive="a.tar.gz")
    assert (found["train_images"] == expected["train_images"][1]).all((1, 2, 3)).sum() == 2


def test_member_that_claims_more_than_is_there_is_refused(tmp_path: Path, mirror: Path) -> None:
    as_tar(mirror / "a.tar", {})
    with tarfile.open(mirror / "a.tar", "w") as archive:
        archive.fileobj.write(special("train/ant/0.png", size=1 << 40).tobuf())  # type: ignore[union-attr]
    assert "cannot be read" in refused(tmp_path, **FOLDER, archive="a.tar")


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
    assert refused(tmp_path, **FOLDER, archive="a.tar.gz").startswith("data.archive: cannot be read as a")


def test_truncated_archive_without_a_hash_is_refused(tmp_path: Path, mirror: Path) -> None:
    archive = as_tar(mirror / "a.tar.gz", {**small_set()[0], "train/zebra/99.png": random.bytes(50_000)})
    archive.write_bytes(archive.read_bytes()[:-20_000])
    assert "cannot be read" in refused(tmp_path, **FOLDER, archive="a.tar.gz")
