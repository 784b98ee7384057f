"""Archives of images: read in a fixed order to fixed bytes; hostile or inconsistent ones are refused."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from source_helpers import (
    FOLDER,
    Files,
    as_folder,
    as_tar,
    as_zip,
    encoded,
    picture,
    prepared,
    refused,
    small_set,
)

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
        (encoded(picture(6, 5)), "5×6 L"),
        (encoded(picture(6, 5, 3), mode="P"), "5×6 P"),
        (encoded(picture(6, 5, 4)), "5×6 RGBA"),
        (encoded(picture(6, 5).astype(np.uint16)), "5×6 I;16"),
        (encoded(picture(6, 5, 3), "BMP"), "not a readable JPEG or PNG"),
        (encoded(picture(6, 5, 3))[:-40], "not a readable JPEG or PNG"),
        (b"<html></html>", "not a readable JPEG or PNG"),
        (b"", "not a readable JPEG or PNG"),
        (png_header_of(30_000, 30_000), "not a readable JPEG or PNG"),
    ],
    ids=["size", "grayscale", "P", "RGBA", "16 bit", "BMP", "cut", "html", "empty", "bomb"],
)
def test_wrong_image_is_refused_by_name(tmp_path: Path, mirror: Path, content: bytes, why: str) -> None:
    as_tar(mirror / "a.tar", {**small_set()[0], "train/zebra/99.png": content})
    message = refused(tmp_path, **FOLDER, archive="a.tar")
    assert "train/zebra/99.png" in message
    assert why in message


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
