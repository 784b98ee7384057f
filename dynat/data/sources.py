"""Sources of images -> one hashed, pickle-free file: embedded digits, CIFAR archives, image folders."""

import io
import json
import os
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors.numpy import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from dynat.config.params import DataSpec
from dynat.data.archives import Files, opened
from dynat.data.download import fetch
from dynat.errors import UserError
from dynat.runtime.files import sha256, write_atomically

DIGITS_TEST_SEED = 0  # the test split stays the same whatever split_seed is
ORDER = {"digits": "scikit-learn index", "image_folder": "file stem, then class"}


class Dataset(NamedTuple):
    """Everything a source holds, in its own order, the training set first."""

    images: np.ndarray  # uint8 [N, C, H, W]
    labels: np.ndarray  # int64 [N]
    classes: list[str]
    train: int  # images of the training set


def prepare(spec: DataSpec, destination: Path, section: str = "data") -> dict[str, Any]:
    """Write the images that ``spec`` asks for to a safetensors file and return its description.

    Tensors ``{train,validation,test}_images`` uint8 [N, C, H, W] and ``_labels`` int64 [N]; classes, order
    and the archive's hash as JSON under the metadata key ``dynat``. Equal data give equal bytes. A download
    is kept in ``data/`` of the DVC repository or, without DVC, of the current folder. Raises ``UserError``,
    which names a key of ``spec`` within ``section``.
    """
    description: dict[str, Any] = {"source": spec.source, "archive": spec.archive, "sha256": None}
    if spec.archive is None:
        data = _digits(spec.test or 0, f"{section}.test")
    else:
        kept = Path(os.environ.get("DVC_ROOT", ""), "data", spec.archive)
        try:
            archive = fetch(spec.archive, spec.md5, spec.sha256, spec.mirrors, kept)
            with opened(archive) as files:
                data = _image_folder(files, spec) if spec.source == "image_folder" else _cifar(files, spec)
        except UserError as error:
            raise UserError(f"{section}.archive: {error}") from None
        description["sha256"] = None if archive.is_dir() else sha256(archive)
    description |= {"order": ORDER.get(spec.source, "official index"), "classes": data.classes}
    if len(data.classes) != spec.classes:
        raise UserError(f"{section}.classes: {spec.classes}, but {spec.source} has {len(data.classes)}")
    train, test = np.split(np.arange(len(data.labels)), [data.train])
    for key, wanted, there in (("train", spec.train, len(train)), ("test", spec.test, len(test))):
        if wanted is not None and wanted > there:
            raise UserError(f"{section}.{key}: {wanted} is more than the {there} images that there are")
    train = train[: spec.train]
    rest, held_out = _split(data.labels[train], spec.validation, spec.split_seed, f"{section}.validation")
    splits = {"train": train[rest], "validation": train[held_out], "test": test[: spec.test]}
    tensors = {f"{split}_images": np.ascontiguousarray(data.images[index]) for split, index in splits.items()}
    tensors |= {f"{split}_labels": data.labels[index] for split, index in splits.items()}
    # one key only: safetensors writes several in an order that differs from process to process
    write_atomically(destination, save(tensors, {"dynat": json.dumps(description, sort_keys=True)}))
    counts = {split: len(index) for split, index in splits.items()}
    return description | counts | {"shape": list(data.images.shape[1:])}


def _split(labels: np.ndarray, count: int, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of the rest and of ``count`` samples, drawn with every class in proportion."""
    index = np.arange(len(labels))
    if not count:
        return index, index[:0]
    try:
        rest, drawn = train_test_split(index, test_size=count, stratify=labels, random_state=seed)
    except ValueError as error:
        raise UserError(f"{key}: {count} of {len(labels)} images cannot be drawn: {error}") from error
    return np.sort(rest), np.sort(drawn)


def _digits(test: int, key: str) -> Dataset:
    """scikit-learn's 1,797 digits, 0..16 scaled to 0..255 and rounded (a half, 127.5, upwards)."""
    found = load_digits()
    images = ((found.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    train, held_out = _split(found.target, test, DIGITS_TEST_SEED, key)
    index = np.concatenate([train, held_out])
    classes = [str(name) for name in found.target_names]
    return Dataset(images[index], found.target[index].astype(np.int64), classes, len(train))


def _cifar(files: Files, spec: DataSpec) -> Dataset:
    """CIFAR-10 or -100 in the official order, batches as torchvision lists them."""
    from torchvision import datasets

    layout = datasets.CIFAR10 if spec.source == "cifar10" else datasets.CIFAR100
    key = "labels" if spec.source == "cifar10" else "fine_labels"
    batches = [name for name, _ in (*layout.train_list, *layout.test_list)]
    meta, *names = (f"{layout.base_folder}/{name}" for name in (layout.meta["filename"], *batches))
    found = {name: _unpickled(name, read()) for name, read in files.items() if name in (meta, *names)}
    if missing := {meta, *names} - found.keys():
        raise UserError(f"{min(missing)} is missing")
    classes = found[meta].get(layout.meta["key"], [])
    read = [_checked(name, found[name], key, len(classes)) for name in names]
    images, labels = map(np.concatenate, zip(*read, strict=True))
    return Dataset(images, labels, classes, sum(len(part) for part, _ in read[: len(layout.train_list)]))


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays, and refuses any other name: no code of a pickle runs."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct")
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _unpickled(name: str, content: bytes) -> dict[str, Any]:
    """The dictionary of a CIFAR batch, which is a pickle of Python 2."""
    try:
        return dict(_ArrayUnpickler(io.BytesIO(content), encoding="latin1").load())
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{name}: not a CIFAR batch: {' '.join(str(error).split())}") from error


def _checked(name: str, batch: Any, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The images uint8 [N, 3, 32, 32] and labels int64 [N] of a batch."""
    images, labels = batch.get("data"), batch.get(key)
    whole = isinstance(images, np.ndarray) and images.dtype == np.uint8 and isinstance(labels, list)
    if not whole or images.shape != (len(labels), 3072) or any(each not in range(classes) for each in labels):
        raise UserError(f"{name}: not a CIFAR batch of uint8 [N, 3072] and N {key} in 0..{classes - 1}")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _image_folder(files: Files, spec: DataSpec) -> Dataset:
    """``train/<class>/*.jpg|png`` and ``test/<class>/*``, ordered by file stem, then class."""
    train, test = _images("train", files), _images("test", files)
    classes = sorted({name.split("/")[1] for name in train})
    if odd := {*classes} ^ {name.split("/")[1] for name in test}:
        raise UserError(f"class {min(odd)!r} is not in both train and test")
    train, test = train[: spec.train], test[: spec.test]
    labels = [classes.index(name.split("/")[1]) for name in (*train, *test)]
    return Dataset(_decoded([*train, *test], files), np.array(labels, np.int64), classes, len(train))


def _images(split: str, files: Files) -> list[str]:
    """The names of a split's images in their final order; hidden files are left."""
    names = [name for name in files if name.startswith(f"{split}/") and "/." not in name]
    for name in names:
        if name.count("/") != 2 or not name.lower().endswith((".jpg", ".jpeg", ".png")):
            raise UserError(f"{name!r} is not {split}/<class>/<image>.jpg or .png")
    if not names:
        raise UserError(f"no image {split}/<class>/*.jpg or .png at its top level")
    return sorted(names, key=lambda name: (PurePosixPath(name).stem, name))


def _decoded(names: list[str], files: Files) -> np.ndarray:
    """The images, uint8 [N, C, H, W] with C = 1 or 3, read in the archive's order."""
    pixels: dict[str, np.ndarray] = dict.fromkeys(names, np.empty(0))
    first = ""
    for name in tqdm([name for name in files if name in pixels], "decoding", leave=False, disable=None):
        content = files[name]()
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                kind, pixels[name] = f"{image.width}×{image.height} {image.mode}", np.asarray(image)
        except Exception as error:  # a damaged image raises nearly anything
            raise UserError(f"{name}: not a readable JPEG or PNG ({type(error).__name__})") from error
        first = first or kind
        if image.mode not in ("L", "RGB") or kind != first:
            raise UserError(
                f"{name} is {kind}; all must be L or RGB (8 bits) and of one size, as {first} before"
            )
    images = np.stack(list(pixels.values()))
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
