"""Sources of images -> one hashed, pickle-free file: embedded digits, CIFAR archives, image folders.

CIFAR's batches are Python 2 pickles: they pass through an unpickler that can build nothing but plain
containers and inert records, so no code of theirs runs.
"""

import io
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from tqdm import tqdm

from dynat.config.params import DataSpec
from dynat.data.archives import Read, opened
from dynat.data.download import fetch
from dynat.errors import UserError
from dynat.runtime.files import sha256, write_atomically

MAX_IMAGE_PIXELS = 1 << 22
MAX_TOTAL_BYTES = 1 << 34  # decoded; the data has to fit on the device
DIGITS_TEST_SEED = 0  # the test split stays the same whatever split_seed is
IMAGE_NAMES = re.compile(r".+\.(jpg|jpeg|png)", re.IGNORECASE)
BROKEN_IMAGE = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)

Array = NDArray[Any]


class Subset(NamedTuple):
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Array
    labels: Array

    def take(self, index: Any) -> "Subset":
        """The images and labels that a numpy index selects."""
        return Subset(self.images[index], self.labels[index])


class Dataset(NamedTuple):
    """Everything a source holds, in its own order, which ``order`` describes."""

    train: Subset
    test: Subset
    classes: list[str]
    order: str


def prepare(spec: DataSpec, destination: Path, section: str = "data") -> dict[str, Any]:
    """Write the images that ``spec`` asks for to a safetensors file and return its description.

    Tensors ``{train,validation,test}_images`` uint8 [N, C, H, W] and ``_labels`` int64 [N]; classes, order
    and the archive's hash as JSON under the metadata key ``dynat``. Equal data give equal bytes. A download
    is kept in the DVC repository's ``data/``, or beside ``destination`` without DVC. Raises ``UserError``,
    which names a key of ``spec`` within ``section``.
    """
    description: dict[str, Any] = {"source": spec.source, "archive": spec.archive, "sha256": None}
    if spec.source == "digits":
        data = _digits(cast(int, spec.test), f"{section}.test")
    else:
        archive = _archive(spec, destination.parent, section)
        data = _image_folder(archive, spec) if spec.source == "image_folder" else _cifar(archive, spec.source)
        description["sha256"] = None if archive.is_dir() else sha256(archive)
    description |= {"order": data.order, "classes": data.classes}
    if len(data.classes) != spec.classes:
        raise UserError(f"{section}.classes: {spec.classes}, but {spec.source} has {len(data.classes)}")
    for key in ("train", "test"):
        wanted, there = getattr(spec, key), len(getattr(data, key).labels)
        if wanted is not None and wanted > there:
            raise UserError(f"{section}.{key}: {wanted} is more than the {there} images that there are")
    train, test = data.train.take(slice(spec.train)), data.test.take(slice(spec.test))
    held_out = _stratified(train.labels, spec.validation, spec.split_seed, f"{section}.validation")
    splits = {"train": train.take(~held_out), "validation": train.take(held_out), "test": test}
    tensors = {
        f"{split}_{kind}": np.ascontiguousarray(array)
        for split, subset in splits.items()
        for kind, array in subset._asdict().items()
    }
    # one key only: safetensors writes several in an order that differs from process to process
    write_atomically(destination, save(tensors, {"dynat": json.dumps(description, sort_keys=True)}))
    counts = {split: len(subset.labels) for split, subset in splits.items()}
    return {**description, **counts, "shape": list(test.images.shape[1:])}


def _archive(spec: DataSpec, folder: Path, section: str) -> Path:
    name, root = cast(str, spec.archive), os.environ.get("DVC_ROOT")
    downloads = Path(root, "data") if root else folder
    try:
        return fetch(name, spec.md5, spec.sha256, spec.mirrors, downloads / name)
    except UserError as error:
        raise UserError(f"{section}.archive: {error}") from None


def _stratified(labels: Array, count: int, seed: int, key: str) -> Array:
    """Boolean [N]: ``count`` samples drawn with ``seed``, every class in proportion."""
    chosen = np.zeros(len(labels), dtype=bool)
    if count:
        from sklearn.model_selection import train_test_split

        try:
            _, index = train_test_split(
                np.arange(len(labels)), test_size=count, stratify=labels, random_state=seed
            )
        except ValueError as error:
            classes = len(np.unique(labels))
            raise UserError(
                f"{key}: {count} of {len(labels)} images cannot be drawn with every class in proportion; "
                f"there are {classes} classes, so take between {classes} and {len(labels) - classes}, or 0"
            ) from error
        chosen[index] = True
    return chosen


def _digits(test: int, key: str) -> Dataset:
    """scikit-learn's 1,797 digits, 0..16 scaled to 0..255 and rounded (a half, 127.5, upwards)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = ((found.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    whole = Subset(images, found.target.astype(np.int64))
    held_out = _stratified(whole.labels, test, DIGITS_TEST_SEED, key)
    classes = [str(name) for name in found.target_names]
    return Dataset(whole.take(~held_out), whole.take(held_out), classes, "scikit-learn index")


def _cifar(archive: Path, source: str) -> Dataset:
    """CIFAR-10 or -100 in the official order, batches as torchvision lists them."""
    from torchvision import datasets

    layout = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
    key = "labels" if source == "cifar10" else "fine_labels"
    train, test = ([name for name, _ in batches] for batches in (layout.train_list, layout.test_list))
    names = {f"{layout.base_folder}/{name}": name for name in (layout.meta["filename"], *train, *test)}
    with opened(archive) as files:
        if missing := names.keys() - files.keys():
            raise UserError(f"{archive.name}: not {source}: {min(missing)} is missing")
        content = {names[path]: (path, read()) for path, read in files.items() if path in names}
    batches = {name: _unpickle(f"{archive.name}: {path}", data) for name, (path, data) in content.items()}
    found = batches[layout.meta["filename"]].get(layout.meta["key"])
    classes = [_text(name) for name in found] if isinstance(found, list) else []

    def joined(names: list[str]) -> Subset:
        read = (_batch(f"{archive.name}: {content[n][0]}", batches[n], key, len(classes)) for n in names)
        return Subset(*map(np.concatenate, zip(*read, strict=True)))

    return Dataset(joined(train), joined(test), classes, "official index")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Record:
    """What a pickle would have called or built; kept, never run."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Knows the three names of a pickled numpy array, each as an inert record; refuses any other."""

    def find_class(self, module: str, name: str) -> type[_Record]:
        numpy_names = ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct")
        if (full := f"{module}.{name}") in (*numpy_names, "numpy._core.multiarray._reconstruct"):
            return _Record
        raise UserError(f"refused: it names {full}, which no CIFAR batch does")


def _unpickle(name: str, content: bytes) -> dict[str, Any]:
    """The dictionary in a pickled CIFAR batch, byte strings for Python 2's, arrays as records."""
    try:
        batch = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
        return {_text(key): value for key, value in batch.items()}
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{name}: not a CIFAR batch ({type(error).__name__})") from error


def _batch(name: str, batch: dict[str, Any], key: str, classes: int) -> Subset:
    """The images and labels of a batch, every field of the pickled array checked before it is believed."""
    try:
        _, (count, width), dtype, fortran, pixels = batch["data"].state
        if dtype.arguments[0] not in (b"u1", "u1") or width != 3 * 32 * 32 or len(pixels) != count * width:
            raise ValueError("data is not uint8 [N, 3072]")
        images = np.frombuffer(pixels, np.uint8).reshape(count, width, order="F" if fortran else "C")
        labels = np.array(batch[key])
        if labels.shape != (count,) or labels.dtype != np.int64:
            raise ValueError(f"{count} images but {key} of shape {labels.shape}")
        if count == 0 or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"{key} must lie in 0..{classes - 1}")
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{name}: not a CIFAR batch ({error})") from error
    return Subset(images.reshape(count, 3, 32, 32), labels)


def _image_folder(archive: Path, spec: DataSpec) -> Dataset:
    """``train/<class>/*.jpg|png`` and ``test/<class>/*``, ordered by file stem, then class."""
    with opened(archive) as files:
        train, test = (_members(archive.name, split, files) for split in ("train", "test"))
        classes = sorted({label for _, label, _ in train})
        if odd := set(classes) ^ {label for _, label, _ in test}:
            raise UserError(f"{archive.name}: class {min(odd)!r} is not in both train and test")
        chosen = [*train[: spec.train], *test[: spec.test]]
        images = _decode(archive.name, [name for *_, name in chosen], files)
    labels = np.array([classes.index(label) for _, label, _ in chosen], dtype=np.int64)
    whole, first = Subset(images, labels), len(train[: spec.train])
    order = "file stem, then class"
    return Dataset(whole.take(slice(first)), whole.take(slice(first, None)), classes, order)


def _members(archive: str, split: str, files: Mapping[str, Read]) -> list[tuple[str, str, str]]:
    """(stem, class, name) of a split's images in their final order; hidden and other files are left."""
    found = []
    for name in files:
        top, *rest = name.split("/")
        if top != split or any(part.startswith(".") for part in rest):
            continue
        if len(rest) != 2 or not IMAGE_NAMES.fullmatch(rest[1]):
            raise UserError(f"{archive}: {name!r} is not {split}/<class>/<image>.jpg or .png")
        found.append((Path(rest[1]).stem, rest[0], name))
    if not found:
        raise UserError(f"{archive}: no image {split}/<class>/*.jpg or .png at its top level")
    return sorted(found)


def _decode(archive: str, names: list[str], files: Mapping[str, Read]) -> Array:
    """The named images, uint8 [N, C, H, W]; all must have the size and mode of the archive's first."""
    rows = {name: row for row, name in enumerate(names)}
    images, first = np.empty(0, np.uint8), ("", "")
    for name in tqdm([name for name in files if name in rows], "decoding", leave=False, disable=None):
        pixels, kind = _pixels(f"{archive}: {name}", files[name]())
        if not first[0]:
            first = (name, kind)
            if len(names) * pixels.size > MAX_TOTAL_BYTES:
                raise UserError(f"{archive}: more than {MAX_TOTAL_BYTES} bytes of pixels; set data.train")
            images = np.empty((len(names), *pixels.shape), np.uint8)
        elif kind != first[1]:
            raise UserError(f"{archive}: {name} is {kind}, but {first[0]} is {first[1]}; all must be alike")
        images[rows[name]] = pixels
    return images


def _pixels(name: str, content: bytes) -> tuple[Array, str]:
    """An image as uint8 [C, H, W], C = 1 or 3, and its size and mode, which are read before it is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            kind = f"{image.width}×{image.height} {'grayscale' if image.mode == 'L' else image.mode}"
            if image.mode not in ("L", "RGB"):
                raise UserError(f"{name}: mode {image.mode}; convert it to 8-bit grayscale or RGB")
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(f"{name}: {kind} is more than {MAX_IMAGE_PIXELS} pixels")
            pixels = np.asarray(image)
    except BROKEN_IMAGE as error:
        raise UserError(f"{name}: not a readable JPEG or PNG ({' '.join(str(error).split())})") from error
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), kind
