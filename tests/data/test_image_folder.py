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
import torch
from PIL import Image
from safetensors import safe_open
from source_helpers import (
    FOLDER,
    Files,
    as_folder,
    as_set,
    as_tar,
    as_zip,
    encoded,
    hash_of,
    picture,
    prepared,
    refused,
    small_set,
    with_hash,
)

from dynat.config.params import DataSpec
from dynat.data.download import verify
from dynat.data.sources import prepare
from dynat.data.splits import load
from dynat.errors import UserError

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
def test_image_folder_is_read_whole_with_its_labels_and_without_litter(
    tmp_path: Path, mirror: Path, name: str, write: Callable[[Path, Files], Path], shape: tuple[int, ...]
) -> None:
    files, expected = small_set(shape)
    litter = (
        "train/.DS_Store",
        "test/ant/._0.png",
        "train/Thumbs.db",
        "test/zebra/desktop.ini",
        "test/zebra/ehthumbs.db",
        "test/ant/@eaDir/0.png/SYNOFILE_THUMB_M.png",
        "train/Icon\r",
        "README.txt",
    )
    rest = dict.fromkeys((*litter, "train/README", "__MACOSX/train/ant/0.png", "LICENSE.md"), b"")
    write(mirror / name, {**files, **(rest if name != "a" else {"train/.DS_Store": b""})})
    found = prepared(tmp_path, **FOLDER, archive=name)
    for split in ("train", "test"):
        arrays = [each[f"{split}_{kind}"] for each in (found, expected) for kind in ("images", "labels")]
        assert arrays[0].dtype == np.uint8
        assert as_set(*arrays[:2]) == as_set(*arrays[2:])
        assert len(arrays[1]) == len(arrays[3])
    assert found["validation_images"].shape == (0, *found["test_images"].shape[1:])


@pytest.mark.parametrize(
    "counts",
    [{"K": 10, "r": 10}, {"a": 90, "b": 9, "c": 1}, {"a": 7, "b": 7, "c": 7, "d": 6}, {"x": 40, "y": 3}],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_n_images_hold_every_class_in_proportion_for_every_n(
    tmp_path: Path, mirror: Path, counts: dict[str, int], seed: int
) -> None:
    files = {  # stems begin with the class, so that any order by name keeps the classes apart
        f"{split}/{label}/{label}_{number:03}.png": encoded(picture(3, 3))
        for label, count in counts.items()
        for number in range(count)
        for split in ("train", "test")
    }
    as_tar(mirror / "a.tar", files)
    spec = {"source": "image_folder", "classes": len(counts), "archive": "a.tar", "split_seed": seed}
    labels = prepared(tmp_path, **spec)["test_labels"]
    share = np.array([counts[name] for name in sorted(counts)]) / len(labels)
    for n in range(1, len(labels) + 1):
        assert np.abs(np.bincount(labels[:n], minlength=len(counts)) - n * share).max() < 1.5
    first = prepared(tmp_path, **spec, train=5, test=4)
    np.testing.assert_array_equal(first["test_labels"], labels[:4])
    assert len(first["train_labels"]) == 5
    again = prepared(tmp_path, **(spec | {"split_seed": seed + 1}))
    assert again["test_images"].tobytes() != prepared(tmp_path, **spec)["test_images"].tobytes()


def test_exif_orientation_turns_an_image_as_people_see_it(tmp_path: Path, mirror: Path) -> None:
    pixels, exif = picture(6, 5, 3), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", exif=exif)
    turned = np.rot90(pixels, -1)
    as_tar(
        mirror / "a.tar",
        {
            "train/ant/0.png": content.getvalue(),
            "train/bee/1.png": encoded(turned + 1),
            **{f"test/{name}/0.png": encoded(picture(5, 6, 3)) for name in ("ant", "bee")},
        },
    )
    found = prepared(tmp_path, **FOLDER, archive="a.tar")
    image = found["train_images"][found["train_labels"].tolist().index(0)]
    np.testing.assert_array_equal(image, turned.transpose(2, 0, 1))


def test_class_names_are_one_class_however_unicode_spells_them(tmp_path: Path, mirror: Path) -> None:
    files = {
        f"{split}/{label}/{number}.png": encoded(picture(4, 4))
        for number, label in enumerate(("caf\u00e9", "cafe\u0301", "tea"))
        for split in ("train", "test")
    }
    as_zip(mirror / "a.zip", files)
    found = prepared(tmp_path, **FOLDER, archive="a.zip")
    assert sorted(found["train_labels"].tolist()) == [0, 0, 1]


def test_zip_with_the_separators_of_windows_is_read(tmp_path: Path, mirror: Path) -> None:
    files, expected = small_set()
    as_zip(mirror / "a.zip", {name.replace("/", "\\"): content for name, content in files.items()})
    found = prepared(tmp_path, **FOLDER, archive="a.zip")
    assert as_set(found["test_images"], found["test_labels"]) == as_set(
        expected["test_images"], expected["test_labels"]
    )


@pytest.mark.parametrize("target", ["nowhere.png", "1.png", "../.."], ids=["dangling", "itself", "around"])
def test_link_that_leads_nowhere_or_round_is_named(tmp_path: Path, mirror: Path, target: str) -> None:
    folder = as_folder(mirror / "a", small_set()[0])
    (folder / "train/ant/1.png").symlink_to(target)
    message = refused(tmp_path, **FOLDER, archive="a", sha256="0" * 64)
    assert "'train/ant/1.png' is a link" in message


def test_images_in_both_splits_and_in_two_classes_are_counted_and_named(tmp_path: Path, mirror: Path) -> None:
    files = small_set()[0]
    files["test/zebra/9.png"] = encoded(
        np.asarray(Image.open(io.BytesIO(files["train/zebra/00.png"]))), "PNG"
    )
    files["train/zebra/8.png"] = files["train/ant/02.png"]
    as_tar(mirror / "a.tar", files)
    destination = tmp_path / "data.safetensors"
    spec = with_hash({**FOLDER, "archive": "a.tar"})
    prepare(DataSpec(**spec), destination)
    both, twice = load(destination, torch.device("cpu")).notes
    assert both.startswith("1 images stand in train and again in test")
    assert "train/zebra/00.png and test/zebra/9.png" in both
    assert twice.startswith("1 images stand in two classes")
    assert {"train/zebra/8.png", "train/ant/02.png"} <= set(twice.replace(",", "").split())


def test_description_names_classes_order_and_the_archives_hash_but_no_path(
    tmp_path: Path, mirror: Path
) -> None:
    archive = as_tar(mirror / "a.tar.gz", small_set()[0])
    destination = tmp_path / "prepared" / "data.safetensors"
    spec = with_hash({**FOLDER, "archive": "a.tar.gz", "train": 4, "validation": 2})
    summary = prepare(DataSpec(**spec), destination)
    with safe_open(destination, "np") as file:
        description = json.loads(file.metadata()["dynat"])
    assert description == {
        "source": "image_folder",
        "archive": "a.tar.gz",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "order": "drawn from split_seed, every class in proportion",
        "classes": ["ant", "zebra"],
    }
    counts = {"train": 2, "validation": 2, "test": 2, "shape": [3, 6, 5]}
    assert summary == {**description, **counts}
    assert str(tmp_path).encode() not in destination.read_bytes()


def test_prepared_file_has_the_same_bytes_in_every_process(tmp_path: Path, mirror: Path) -> None:
    archive = as_zip(mirror / "a.zip", small_set()[0])
    script = (
        "import sys; from pathlib import Path\n"
        "from dynat.config.params import DataSpec; from dynat.data.sources import prepare\n"
        f"spec = DataSpec(source='image_folder', classes=2, archive='a.zip', sha256='{hash_of(archive)}')\n"
        "prepare(spec, Path(sys.argv[1]))"
    )
    digests = set()
    for seed in ("1", "2", "3"):
        path = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", script, path], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


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


def test_hash_of_a_folder_is_that_of_its_files_and_no_other_folder_passes(
    tmp_path: Path, mirror: Path
) -> None:
    folder = as_folder(mirror / "a", small_set()[0])
    wanted = hash_of(folder)
    prepared(tmp_path, **FOLDER, archive="a", sha256=wanted)
    (folder / "train/README.txt").write_text("not an image, and in no hash")
    prepared(tmp_path, **FOLDER, archive="a", sha256=wanted)
    image = folder / "train/ant/01.png"
    image.rename(image.with_stem("0x"))
    assert f"expected sha256 {wanted}" in refused(tmp_path, **FOLDER, archive="a", sha256=wanted)


@pytest.mark.parametrize("write", [as_tar, as_folder])
def test_image_folder_without_its_hash_is_refused_with_the_value_to_write(
    tmp_path: Path, mirror: Path, write: Callable[[Path, Files], Path]
) -> None:
    path = write(mirror / "a", small_set()[0])
    message = refused(tmp_path, **FOLDER, archive="a", sha256=None)
    assert message.startswith("data.sha256: needed")
    assert hash_of(path) in message


def test_a_folder_that_cannot_be_hashed_is_refused_by_the_key_of_its_archive(
    tmp_path: Path, mirror: Path
) -> None:
    (mirror / "broken").mkdir()
    (mirror / "broken/link.png").symlink_to("nowhere")
    for sha256 in (None, "0" * 64):
        spec = DataSpec(source="image_folder", archive="broken", sha256=sha256, classes=2)
        with pytest.raises(UserError, match=r"^study\.mine\.data\.archive: 'link.png' is a link to nothing"):
            verify(spec, "study.mine.data")


def test_verify_says_what_differs_downloads_nothing_and_is_silent_where_nothing_is_at_hand(
    mirror: Path,
) -> None:
    spec = DataSpec(**FOLDER, archive="a.tar", sha256="0" * 64, mirrors=["http://127.0.0.1:9/"])
    verify(spec, "study.mine.data")
    found = hash_of(as_tar(mirror / "a.tar", small_set()[0]))
    with pytest.raises(UserError, match=rf"^study\.mine\.data\.archive: .*{found}"):
        verify(spec, "study.mine.data")
    verify(spec.model_copy(update={"sha256": found}), "study.mine.data")


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
        (b"", "not a readable JPEG or PNG (it is empty)"),
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
def test_real_cifar10_images_are_read_with_the_official_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(CIFAR10_JPEG.parent))
    found = prepared(tmp_path, source="image_folder", classes=10, archive=CIFAR10_JPEG.name)
    assert found["test_images"].shape == (10_000, 3, 32, 32)
    assert np.bincount(found["train_labels"]).tolist() == [5000] * 10
    assert np.bincount(found["test_labels"]).tolist() == [1000] * 10
    assert np.bincount(found["test_labels"][:100]).tolist() == [10] * 10
    official = [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # of the first ten test images
    with tarfile.open(CIFAR10_JPEG) as archive:
        members = {name.rsplit("/", 1)[1]: name for name in archive.getnames() if name.startswith("test/")}
        for number, label in enumerate(official):
            content = archive.extractfile(members[f"{number:05}.jpg"]).read()  # type: ignore[union-attr]
            reference = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
            (place,) = np.flatnonzero((found["test_images"] == reference).all((1, 2, 3)))
            assert found["test_labels"][place] == label
