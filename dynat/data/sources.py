"""Sources of images -> one hashed, pickle-free file: embedded digits, CIFAR archives, image folders."""

import hashlib
import io
import json
import pickle
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from dynat.config.params import DataSpec, Extent
from dynat.data.archives import Files, opened
from dynat.data.download import fetch, kept, verify
from dynat.errors import UserError
from dynat.runtime.files import sha256, write_atomically

CIFAR = (50_000, 10_000)  # images to train on and to test with, every class alike
DIGITS_TEST_SEED = 0  # the test split stays the same whatever split_seed is
ORDER = {"digits": "scikit-learn index", "image_folder": "drawn from split_seed, every class in proportion"}


class Dataset(NamedTuple):
    """Everything a source holds, in its own order, the training set first."""

    images: np.ndarray  # uint8 [N, C, H, W]
    labels: np.ndarray  # int64 [N]
    classes: list[str]
    train: int  # images of the training set
    notes: tuple[str, ...] = ()  # what must stand beside every number from them


def prepare(spec: DataSpec, destination: Path, section: str = "data") -> dict[str, Any]:
    """Write the images that ``spec`` asks for to a safetensors file and return its description.

    Tensors ``{train,validation,test}_images`` uint8 [N, C, H, W] and ``_labels`` int64 [N]; classes, order,
    the archive's hash and notes, if there are any, as JSON under the metadata key ``dynat``. Equal data give
    equal bytes. Raises ``UserError``, which names a key of ``spec`` within ``section``.
    """
    description: dict[str, Any] = {"source": spec.source, "archive": spec.archive, "sha256": None}
    if spec.archive is None:
        data = _digits(spec.test or 0, f"{section}.test")
    else:
        if spec.source == "image_folder" and not spec.sha256:
            verify(spec, section)
        try:
            archive = fetch(spec.archive, spec.md5, spec.sha256, spec.mirrors, kept(spec.archive))
            with opened(archive) as files:
                data = _image_folder(files, spec) if spec.source == "image_folder" else _cifar(files, spec)
        except UserError as error:
            raise UserError(f"{section}.archive: {error}") from None
        description["sha256"] = spec.sha256 or sha256(archive)
    description |= {"order": ORDER.get(spec.source, "official index"), "classes": data.classes}
    description |= {"notes": data.notes} if data.notes else {}
    splits = _splits(data.labels, data.train, len(data.classes), spec, section)
    tensors = {f"{split}_images": np.ascontiguousarray(data.images[index]) for split, index in splits.items()}
    tensors |= {f"{split}_labels": data.labels[index] for split, index in splits.items()}
    # one key only: safetensors writes several in an order that differs from process to process
    write_atomically(destination, save(tensors, {"dynat": json.dumps(description, sort_keys=True)}))
    counts = {split: len(index) for split, index in splits.items()}
    return description | counts | {"shape": list(data.images.shape[1:])}


def extent(spec: DataSpec, section: str) -> Extent | None:
    """What ``prepare`` would make of ``spec``, as far as that is known before: None of own images.

    Raises ``UserError`` as ``prepare`` would, for what no archive is needed for.
    """
    if spec.source == "image_folder":
        return None
    if spec.source == "digits":
        data = _digits(spec.test or 0, f"{section}.test")
        labels, train, classes, shape = data.labels, data.train, len(data.classes), (1, 8, 8)
    else:
        classes, shape = 10 if spec.source == "cifar10" else 100, (3, 32, 32)
        labels, train = np.arange(sum(CIFAR)) % classes, CIFAR[0]
    splits = _splits(labels, train, classes, spec, section)
    return Extent(shape, len(splits["train"]), len(splits["test"]))


def _splits(
    labels: np.ndarray, train: int, classes: int, spec: DataSpec, section: str
) -> dict[str, np.ndarray]:
    """Indices of each split in the images of a source, the first ``train`` of which are for training."""
    if classes != spec.classes:
        raise UserError(f"{section}.classes: {spec.classes}, but {spec.source} has {classes}")
    whole, test = np.split(np.arange(len(labels)), [train])
    for key, wanted, there in (("train", spec.train, len(whole)), ("test", spec.test, len(test))):
        if wanted is not None and wanted > there:
            raise UserError(f"{section}.{key}: {wanted} is more than the {there} images that there are")
    whole = whole[: spec.train]
    rest, held_out = _split(labels[whole], spec.validation, spec.split_seed, f"{section}.validation")
    return {"train": whole[rest], "validation": whole[held_out], "test": test[: spec.test]}


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
    """``train/<class>/*.jpg|png`` and ``test/<class>/*``; the first n hold every class in proportion."""
    train, test = _images("train", files), _images("test", files)
    classes = sorted({*train.values()})
    if odd := {*classes} ^ {*test.values()}:
        raise UserError(f"class {min(odd)!r} is not in both train and test")
    names, labels = list[str](), list[int]()
    for images, count in ((train, spec.train), (test, spec.test)):
        label = np.array([classes.index(name) for name in images.values()])
        drawn = _mixed(label, spec.split_seed)[:count]
        names += [[*images][index] for index in drawn]
        labels += label[drawn].tolist()
    pixels, trained = _decoded(names, files), min(len(train), spec.train or len(train))
    return Dataset(pixels, np.array(labels), classes, trained, _repeated(pixels, labels, names, trained))


def _images(split: str, files: Files) -> dict[str, str]:
    """Name -> class of a split's images, by file stem, then class; classes in one Unicode form."""
    found = {}
    for name in (name for name in files if name.startswith(f"{split}/")):
        if name.count("/") != 2 or not name.lower().endswith((".jpg", ".jpeg", ".png")):
            raise UserError(f"{name!r} is not {split}/<class>/<image>.jpg or .png")
        found[name] = unicodedata.normalize("NFC", name.split("/")[1])
    if not found:
        raise UserError(f"no image {split}/<class>/*.jpg or .png at its top level")
    order = sorted(found, key=lambda name: (PurePosixPath(name).stem, found[name], name))
    return {name: found[name] for name in order}


def _mixed(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order of the samples in which the first n have every class in proportion, for every n.

    Each class is shuffled and spread evenly over the whole; where classes begin is shuffled too.
    """
    draw, place = np.random.RandomState(seed), np.empty(len(labels))  # the stream of RandomState is frozen
    classes = np.unique(labels)
    for start, label in zip(draw.permutation(len(classes)), classes, strict=True):
        count = int((labels == label).sum())
        place[labels == label] = (draw.permutation(count) + (start + 0.5) / len(classes)) / count
    return np.argsort(place, kind="stable")


def _repeated(images: np.ndarray, labels: list[int], names: list[str], train: int) -> tuple[str, ...]:
    """A sentence for images that stand in both splits, and one for those that stand in two classes."""
    first: dict[bytes, int] = {}
    found: dict[str, list[str]] = {"in train and again in test": [], "in two classes": []}
    for index, image in enumerate(images):
        before = first.setdefault(hashlib.sha256(image.tobytes()).digest(), index)
        for where, holds in zip(
            found, (before < train <= index, labels[before] != labels[index]), strict=True
        ):
            found[where] += [f"{names[before]} and {names[index]}"] if holds else []
    return tuple(
        f"{len(pairs)} images stand {where}, such as {pairs[0]}" for where, pairs in found.items() if pairs
    )


def _decoded(names: list[str], files: Files) -> np.ndarray:
    """The images, uint8 [N, C, H, W] with C = 1 or 3, read in the archive's order."""
    pixels: dict[str, np.ndarray] = dict.fromkeys(names, np.empty(0))
    first = ""
    for name in tqdm([name for name in files if name in pixels], "decoding", leave=False, disable=None):
        content = files[name]()
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                turned = ImageOps.exif_transpose(image)  # as people see it
                kind, pixels[name] = f"{turned.width}×{turned.height} {turned.mode}", np.asarray(turned)
        except Exception as error:  # a damaged image raises nearly anything
            why = type(error).__name__ if content else "it is empty"
            raise UserError(f"{name}: not a readable JPEG or PNG ({why})") from error
        first = first or kind
        if turned.mode not in ("L", "RGB") or kind != first:
            raise UserError(
                f"{name} is {kind}; all must be L or RGB (8 bits) and of one size, as {first} before"
            )
    images = np.stack(list(pixels.values()))
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
