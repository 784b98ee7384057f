"""Archives of images: read in a fixed order to fixed bytes; hostile or inconsistent ones are refused."""

import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from source_helpers import Arrays, Files, as_folder, as_tar, picture, prepared, random, refused

from dynat.config.params import DataSpec
from dynat.data.sources import prepare

CIFAR10_JPEG = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.gz"


@pytest.fixture(autouse=True)
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(folder))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


def encoded(pixels: np.ndarray[Any, Any], form: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, form)
    return buffer.getvalue()


def small_set(shape: tuple[int, ...] = (6, 5, 3)) -> tuple[Files, Arrays]:
    """Files in scrambled order, and the arrays that they must become."""
    order = {
        "train": [("zebra", "00"), ("ant", "01"), ("ant", "02"), ("zebra", "02"), ("ant", "10")],
        "test": [("ant", "0"), ("zebra", "1")],
    }
    files, arrays = {}, {}
    for split, members in order.items():
        images = [picture(*shape) for _ in members]
        for (label, stem), image in zip(members, images, strict=True):
            files[f"{split}/{label}/{stem}.png"] = encoded(image)
        stacked = np.stack(images)
        arrays[f"{split}_images"] = stacked.transpose(0, 3, 1, 2) if stacked.ndim == 4 else stacked[:, None]
        arrays[f"{split}_labels"] = np.array([["ant", "zebra"].index(label) for label, _ in members])
    return dict(sorted(files.items(), key=lambda item: hashlib.md5(item[0].encode()).digest())), arrays


def as_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


FOLDER = {"source": "image_folder", "classes": 2}


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.tar.gz", as_tar), ("a.tgz", as_tar), ("a.tar", as_tar), ("a.zip", as_zip), ("a", as_folder)],
)
@pytest.mark.parametrize("shape", [(6, 5, 3), (4, 4)], ids=["RGB", "grayscale"])
def test_image_folder_is_read_in_order_of_stem_then_class(
    tmp_path: Path, mirror: Path, name: str, write: Callable[[Path, Files], Path], shape: tuple[int, ...]
) -> None:
    files, expected = small_set(shape)
    write(mirror / name, {"README.txt": b"", "train/.DS_Store": b"", **files, "test/ant/._0.png": b""})
    found = prepared(tmp_path, **FOLDER, archive=name)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
    assert found["validation_images"].shape == (0, *found["test_images"].shape[1:])


def test_description_names_classes_order_and_the_archives_hash_but_no_path(
    tmp_path: Path, mirror: Path
) -> None:
    archive = as_tar(mirror / "a.tar.gz", small_set()[0])
    destination = tmp_path / "prepared" / "data.safetensors"
    summary = prepare(DataSpec(**FOLDER, archive="a.tar.gz", train=4, validation=2), destination)
    with safe_open(destination, "np") as file:
        description = json.loads(file.metadata()["dynat"])
    assert description == {
        "source": "image_folder",
        "archive": "a.tar.gz",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "order": "file stem, then class",
        "classes": ["ant", "zebra"],
    }
    counts = {"train": 2, "validation": 2, "test": 2, "shape": [3, 6, 5]}
    assert summary == {**description, **counts}
    assert str(tmp_path).encode() not in destination.read_bytes()


def test_prepared_file_has_the_same_bytes_in_every_process(tmp_path: Path, mirror: Path) -> None:
    as_zip(mirror / "a.zip", small_set()[0])
    script = (
        "import sys; from pathlib import Path\n"
        "from dynat.config.params import DataSpec; from dynat.data.sources import prepare\n"
        "prepare(DataSpec(source='image_folder', classes=2, archive='a.zip'), Path(sys.argv[1]))"
    )
    digests = set()
    for seed in ("1", "2", "3"):
        path = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", script, path], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_train_and_test_take_the_first_images(tmp_path: Path, mirror: Path) -> None:
    files, expected = small_set()
    as_tar(mirror / "a.tar", files)
    found = prepared(tmp_path, **FOLDER, archive="a.tar", train=3, test=1)
    np.testing.assert_array_equal(found["train_images"], expected["train_images"][:3])
    np.testing.assert_array_equal(found["test_labels"], expected["test_labels"][:1])


@pytest.mark.parametrize(("key", "there"), [("train", 5), ("test", 2)])
def test_more_images_than_there_are_is_refused_by_its_key(
    tmp_path: Path, mirror: Path, key: str, there: int
) -> None:
    as_tar(mirror / "a.tar", small_set()[0])
    message = refused(tmp_path, **FOLDER, archive="a.tar", **{key: 6})
    assert message == f"data.{key}: 6 is more than the {there} images that there are"


def test_archive_that_differs_from_its_hash_is_not_opened(tmp_path: Path, mirror: Path) -> None:
    archive = as_tar(mirror / "a.tar", small_set()[0])
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    message = refused(tmp_path, **FOLDER, archive="a.tar", sha256="0" * 64)
    assert f"expected sha256 {'0' * 64}, found {found}" in message


def test_hash_of_an_unpacked_folder_is_refused(tmp_path: Path, mirror: Path) -> None:
    as_folder(mirror / "a", small_set()[0])
    assert "is a folder, which has no sha256" in refused(tmp_path, **FOLDER, archive="a", sha256="0" * 64)


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


def png_header_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (encoded(picture(5, 6, 3)), "6×5 RGB"),
        (encoded(picture(6, 5)), "5×6 grayscale"),
        (encoded(picture(6, 5, 3), mode="P"), "mode P"),
        (encoded(picture(6, 5, 4)), "mode RGBA"),
        (encoded(picture(6, 5).astype(np.uint16)), "mode I;16"),
        (encoded(picture(6, 5, 3), "BMP"), "not a readable JPEG or PNG"),
        (encoded(picture(6, 5, 3))[:-40], "not a readable JPEG or PNG"),
        (b"<html></html>", "not a readable JPEG or PNG"),
        (b"", "not a readable JPEG or PNG"),
        (png_header_of(30_000, 30_000), "not a readable JPEG or PNG|more than"),
        (png_header_of(4_000, 4_000), "more than"),
    ],
    ids=["size", "grayscale", "P", "RGBA", "16 bit", "BMP", "cut", "html", "empty", "bomb", "large"],
)
def test_wrong_image_is_refused_by_name(tmp_path: Path, mirror: Path, content: bytes, why: str) -> None:
    as_tar(mirror / "a.tar", {**small_set()[0], "train/zebra/99.png": content})
    message = refused(tmp_path, **FOLDER, archive="a.tar")
    assert "train/zebra/99.png" in message
    assert any(word in message for word in why.split("|"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"test/newt/0.png": b""}, "class 'newt' is not in both train and test"),
        ({"train/ant/sub/0.png": b""}, "'train/ant/sub/0.png' is not train/<class>/<image>"),
        ({"train/0.png": b""}, "'train/0.png' is not train/<class>/<image>"),
        ({"train/ant/labels.csv": b""}, "'train/ant/labels.csv' is not train/<class>/<image>"),
        (
            {"train/bee/0.png": encoded(picture(6, 5, 3)), "test/bee/0.png": encoded(picture(6, 5, 3))},
            "data.classes",
        ),
    ],
)
def test_wrong_layout_is_refused(tmp_path: Path, mirror: Path, changes: Files, why: str) -> None:
    as_tar(mirror / "a.tar", {**small_set()[0], **changes})
    assert why in refused(tmp_path, **FOLDER, archive="a.tar")


def test_archive_without_images_at_its_top_level_is_refused(tmp_path: Path, mirror: Path) -> None:
    as_tar(mirror / "a.tar", {f"mine/{name}": content for name, content in small_set()[0].items()})
    assert "no image train/<class>/*.jpg or .png at its top" in refused(tmp_path, **FOLDER, archive="a.tar")


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x1f\x8b\x08\x00broken", b"PK\x03\x04broken"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, mirror: Path, content: bytes) -> None:
    (mirror / "a.tar.gz").write_bytes(content)
    assert refused(tmp_path, **FOLDER, archive="a.tar.gz").startswith("a.tar.gz: cannot be read as a folder")


def test_truncated_archive_without_a_hash_is_refused(tmp_path: Path, mirror: Path) -> None:
    archive = as_tar(mirror / "a.tar.gz", {**small_set()[0], "train/zebra/99.png": random.bytes(50_000)})
    archive.write_bytes(archive.read_bytes()[:-20_000])
    assert "cannot be read" in refused(tmp_path, **FOLDER, archive="a.tar.gz")


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_JPEG.exists(), reason="needs ../shared/data/cifar10-jpeg.tar.gz")
def test_real_cifar10_images_come_in_official_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(CIFAR10_JPEG.parent))
    found = prepared(tmp_path, source="image_folder", classes=10, archive=CIFAR10_JPEG.name)
    assert found["test_images"].shape == (10_000, 3, 32, 32)
    assert np.bincount(found["train_labels"]).tolist() == [5000] * 10
    assert np.bincount(found["test_labels"]).tolist() == [1000] * 10
    assert found["train_labels"][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # the official ones
    assert found["test_labels"][:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    with tarfile.open(CIFAR10_JPEG) as archive:
        members = {name.rsplit("/", 1)[1]: name for name in archive.getnames() if name.startswith("test/")}
        content = archive.extractfile(members["01234.jpg"]).read()  # type: ignore[union-attr]
    reference = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    np.testing.assert_array_equal(found["test_images"][1234], reference)
