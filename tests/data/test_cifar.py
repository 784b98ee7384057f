"""CIFAR's pickled archives: the official images in the official order, and no code of theirs run."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_helpers import Arrays, Files, as_folder, as_tar, picture, prepared, random, refused


@pytest.fixture(autouse=True)
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(folder))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


def python2_bytes(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


def python2_array(pixels: np.ndarray[Any, Any]) -> bytes:
    """What Python 2's ``cPickle.dumps(array, 2)`` writes, which is what CIFAR's batches hold."""
    fortran = not pixels.flags.c_contiguous
    shape = b"".join(b"J" + struct.pack("<i", size) for size in pixels.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + (shape + b"\x86" + dtype + (b"\x88" if fortran else b"\x89"))
        + (python2_bytes(pixels.tobytes("F" if fortran else "C")) + b"tb")
    )


def python2_pickle(fields: dict[bytes, bytes]) -> bytes:
    """A pickled Python 2 dictionary; the values are opcodes already."""
    return b"\x80\x02}(" + b"".join(python2_bytes(key) + value for key, value in fields.items()) + b"u."


def numbers(values: Any) -> bytes:
    return b"](" + b"".join(b"J" + struct.pack("<i", int(value)) for value in values) + b"e"


def cifar10(count: int = 4, order: str = "C") -> tuple[Files, Arrays]:
    pixels = [np.asarray(picture(count, 3072), order=order) for _ in range(6)]  # type: ignore[call-overload]
    labels = [random.integers(0, 10, count) for _ in range(6)]
    names = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
    meta = {b"label_names": b"](" + b"".join(python2_bytes(b"class %d" % i) for i in range(10)) + b"e"}
    files = {"cifar-10-batches-py/batches.meta": python2_pickle(meta)}
    for name, data, label in reversed(list(zip(names, pixels, labels, strict=True))):
        batch = {b"labels": numbers(label), b"data": python2_array(data)}
        files[f"cifar-10-batches-py/{name}"] = python2_pickle(batch)
    return files, {
        "train_images": np.concatenate(pixels[:5]).reshape(-1, 3, 32, 32),
        "train_labels": np.concatenate(labels[:5]),
        "test_images": pixels[5].reshape(-1, 3, 32, 32),
        "test_labels": labels[5],
    }


def spec_of(archive: Path, source: str = "cifar10") -> dict[str, Any]:
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    classes = 10 if source == "cifar10" else 100
    return {"source": source, "classes": classes, "archive": archive.name, "md5": md5}


@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar10_is_read_in_the_official_order(tmp_path: Path, mirror: Path, order: str) -> None:
    files, expected = cifar10(order=order)
    found = prepared(tmp_path, **spec_of(as_tar(mirror / "c.tar.gz", files)))
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)


def test_cifar10_is_what_torchvision_reads(tmp_path: Path, mirror: Path) -> None:
    from torchvision.datasets import CIFAR10

    files, _ = cifar10()
    found = prepared(tmp_path, **spec_of(as_tar(mirror / "c.tar.gz", files)))
    as_folder(tmp_path / "torchvision", files)

    def md5(name: str) -> str:
        return hashlib.md5(files[f"cifar-10-batches-py/{name}"]).hexdigest()

    class Small(CIFAR10):  # type: ignore[misc]
        train_list = [[name, md5(name)] for name, _ in CIFAR10.train_list]
        test_list = [[name, md5(name)] for name, _ in CIFAR10.test_list]
        meta = {**CIFAR10.meta, "md5": md5("batches.meta")}

    for split in ("train", "test"):
        reference = Small(tmp_path / "torchvision", train=split == "train")
        np.testing.assert_array_equal(found[f"{split}_images"], reference.data.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(found[f"{split}_labels"], reference.targets)


def test_cifar100_takes_the_fine_labels(tmp_path: Path, mirror: Path) -> None:
    fine, pixels = np.array([99, 0, 57]), picture(3, 3072)
    batch = python2_pickle(
        {b"coarse_labels": numbers([1, 2, 3]), b"fine_labels": numbers(fine), b"data": python2_array(pixels)}
    )
    names = b"](" + b"".join(python2_bytes(b"%d" % index) for index in range(100)) + b"e"
    files = {
        "cifar-100-python/meta": python2_pickle({b"fine_label_names": names}),
        "cifar-100-python/train": batch,
        "cifar-100-python/test": batch,
    }
    found = prepared(tmp_path, **spec_of(as_tar(mirror / "c.tar.gz", files), "cifar100"))
    np.testing.assert_array_equal(found["train_labels"], fine)
    np.testing.assert_array_equal(found["test_images"], pixels.reshape(3, 3, 32, 32))


class Payload:
    """Touches a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_a_payload_is_refused_and_not_executed(
    tmp_path: Path, mirror: Path, protocol: int
) -> None:
    files, _ = cifar10()
    payload = pickle.dumps({"data": Payload(tmp_path / "executed"), "labels": []}, protocol)
    files["cifar-10-batches-py/data_batch_3"] = payload
    message = refused(tmp_path, **spec_of(as_tar(mirror / "c.tar.gz", files)))
    assert "data_batch_3" in message
    assert "system" in message
    assert not (tmp_path / "executed").exists()


ARRAY = python2_array(picture(4, 3072))


@pytest.mark.parametrize(
    "batch",
    [
        {b"labels": numbers([1, 2, 3]), b"data": ARRAY},
        {b"labels": numbers([1, 2, 3, 10]), b"data": ARRAY},
        {b"labels": numbers([1, 2, 3, -1]), b"data": ARRAY},
        {b"labels": python2_bytes(b"1234"), b"data": ARRAY},
        {b"labels": ARRAY, b"data": ARRAY},
        {b"data": ARRAY},
        {b"labels": numbers([1, 2, 3, 4])},
        {b"labels": numbers([1, 2, 3, 4]), b"data": numbers([1, 2])},
        {b"labels": numbers([1, 2, 3, 4]), b"data": python2_array(picture(4, 3071))},
        {b"labels": numbers([1, 2, 3, 4]), b"data": ARRAY.replace(b"u1", b"i1")},
        {b"labels": numbers([1, 2, 3, 4]), b"data": ARRAY.replace(b"J\x04\0\0\0J", b"J\x05\0\0\0J", 1)},
        {b"labels": numbers([1, 2, 3, 4]), b"data": b"cnumpy\nndarray\n"},
    ],
    ids=[
        *("count", "range", "negative", "text", "records", "no labels"),
        *("no data", "list", "width", "dtype", "lying shape", "bare class"),
    ],
)
def test_batch_whose_fields_disagree_is_refused_by_name(
    tmp_path: Path, mirror: Path, batch: dict[bytes, bytes]
) -> None:
    files, _ = cifar10()
    files["cifar-10-batches-py/data_batch_2"] = python2_pickle(batch)
    message = refused(tmp_path, **spec_of(as_tar(mirror / "c.tar.gz", files)))
    assert "cifar-10-batches-py/data_batch_2: not a CIFAR batch" in message


@pytest.mark.parametrize(
    "content", [b"", b"<html></html>", cifar10()[0]["cifar-10-batches-py/test_batch"][:999]]
)
def test_damaged_batch_is_refused_by_name(tmp_path: Path, mirror: Path, content: bytes) -> None:
    files, _ = cifar10()
    files["cifar-10-batches-py/test_batch"] = content
    assert "test_batch: not a CIFAR batch" in refused(tmp_path, **spec_of(as_tar(mirror / "c.tar.gz", files)))


def test_archive_of_something_else_is_refused(tmp_path: Path, mirror: Path) -> None:
    archive = as_tar(mirror / "c.tar.gz", cifar10()[0])
    message = refused(tmp_path, **spec_of(archive, "cifar100"))
    assert "data.archive: cifar-100-python/meta is missing" in message
