"""Sources of images -> one hashed, pickle-free file: embedded digits, CIFAR archives, image folders.

CIFAR's batches are Python 2 pickles: they pass through an unpickler that can build nothing but plain
containers and inert records, so no code of theirs runs.
"""

import io
import json
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from tqdm import tqdm

from dynat.config.params import DataSpec
from dynat.data import archives
from dynat.data.download import fetch
from dynat.errors import UserError
from dynat.runtime.files import write_atomically

MAX_IMAGE_PIXELS = 1 << 22
MAX_TOTAL_BYTES = 1 << 34  # decoded; the data has to fit on the device
DIGITS_TEST_SEED = 0  # the test split stays the same whatever split_seed is
IMAGE_NAMES = re.compile(r".+\.(jpg|jpeg|png)", re.IGNORECASE)
BROKEN_IMAGE = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError)

Array = NDArray[Any]


class Part(NamedTuple):
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Array
    labels: Array

    def take(self, index: Any) -> "Part":
        """The part that a numpy index selects."""
        return Part(self.images[index], self.labels[index])


class Source(NamedTuple):
    """Everything a source holds, in its own order, which ``order`` describes."""

    train: Part
    test: Part
    classes: list[str]
    order: str
    sha256: str | None  # of the archive


def prepare(spec: DataSpec, destination: Path, section: str = "data") -> dict[str, Any]:
    """Write the images that ``spec`` asks for to a safetensors file and return its description.

    Tensors ``{train,validation,test}_images`` uint8 [N, C, H, W] and ``_labels`` int64 [N]; classes, order
    and the archive's hash as JSON under the metadata key ``dynat``. Equal data give equal bytes. A download
    is kept in the DVC repository's ``data/``, or beside ``destination`` without DVC. Raises ``UserError``,
    which names a key of ``spec`` within ``section``.
    """
    if spec.source == "digits":
        source = _digits(cast(int, spec.test), f"{section}.test")
    else:
        name = cast(str, spec.archive)
        root = os.environ.get("DVC_ROOT")
        downloads = Path(root, "data") if root else destination.parent
        try:
            archive = fetch(name, spec.md5, spec.sha256, spec.mirrors, downloads / name)
        except UserError as error:
            raise UserError(f"{section}.archive: {error}") from None
        source = (
            _image_folder(archive, spec) if spec.source == "image_folder" else _cifar(archive, spec.source)
        )
    if len(source.classes) != spec.classes:
        raise UserError(f"{section}.classes: {spec.classes}, but {spec.source} has {len(source.classes)}")
    train = _first(source.train, spec.train, f"{section}.train")
    test = _first(source.test, spec.test, f"{section}.test")
    held_out = _stratified(train.labels, spec.validation, spec.split_seed, f"{section}.validation")
    parts = {"train": train.take(~held_out), "validation": train.take(held_out), "test": test}
    description: dict[str, Any] = {
        "source": spec.source,
        "archive": spec.archive,
        "sha256": source.sha256,
        "order": source.order,
        "classes": source.classes,
    }
    tensors = {
        f"{split}_{kind}": np.ascontiguousarray(array)
        for split, part in parts.items()
        for kind, array in part._asdict().items()
    }
    # one key only: safetensors writes several in an order that differs from process to process
    write_atomically(destination, save(tensors, {"dynat": json.dumps(description, sort_keys=True)}))
    counts = {split: len(part.labels) for split, part in parts.items()}
    return {**description, **counts, "shape": list(test.images.shape[1:])}


def _first(part: Part, count: int | None, key: str) -> Part:
    available = len(part.labels)
    if count is not None and count > available:
        raise UserError(f"{key}: {count} is more than the {available} images that there are")
    return part.take(slice(count))


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


def _digits(test: int, key: str) -> Source:
    """scikit-learn's 1,797 digits, 0..16 scaled to 0..255 and rounded (a half, 127.5, upwards)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = ((found.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    whole = Part(images, found.target.astype(np.int64))
    held_out = _stratified(whole.labels, test, DIGITS_TEST_SEED, key)
    classes = [str(name) for name in found.target_names]
    return Source(whole.take(~held_out), whole.take(held_out), classes, "scikit-learn index", None)


def _cifar(archive: Path, source: str) -> Source:
    """CIFAR-10 or -100 in the official order, batches as torchvision lists them."""
    from torchvision import datasets

    layout = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
    folder, meta = layout.base_folder, layout.meta
    train, test = (
        [f"{folder}/{name}" for name, _ in files] for files in (layout.train_list, layout.test_list)
    )
    names = f"{folder}/{meta['filename']}"
    wanted = {*train, *test, names}
    if missing := wanted - set(archives.listing(archive)):
        raise UserError(f"{archive.name}: not {source}: {min(missing)} is missing")
    batches = {
        name: _unpickle(f"{archive.name}: {name}", content)
        for name, content in archives.contents(archive, wanted)
    }
    labels = "labels" if source == "cifar10" else "fine_labels"
    found = batches[names].get(meta["key"])
    classes = [_text(name) for name in found] if isinstance(found, list) else []

    def part(files: list[str]) -> Part:
        read = [_batch(f"{archive.name}: {name}", batches[name], labels, len(classes)) for name in files]
        return Part(*(np.concatenate(arrays) for arrays in zip(*read, strict=True)))

    return Source(part(train), part(test), classes, "official index", archives.sha256(archive))


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


def _batch(name: str, batch: dict[str, Any], key: str, classes: int) -> Part:
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
    return Part(images.reshape(count, 3, 32, 32), labels)


def _image_folder(archive: Path, spec: DataSpec) -> Source:
    """``train/<class>/*.jpg|png`` and ``test/<class>/*``, ordered by file stem, then class."""
    members = _members(archive)
    train, test = members["train"][: spec.train], members["test"][: spec.test]
    classes = sorted({label for _, label, _ in members["train"]})
    if odd := set(classes) ^ {label for _, label, _ in members["test"]}:
        raise UserError(f"{archive.name}: class {min(odd)!r} is not in both train and test")
    images = _decode(archive, [name for *_, name in (*train, *test)])
    labels = np.array([classes.index(label) for _, label, _ in (*train, *test)], dtype=np.int64)
    whole, first = Part(images, labels), len(train)
    order = "file stem, then class"
    return Source(
        whole.take(slice(first)), whole.take(slice(first, None)), classes, order, archives.sha256(archive)
    )


def _members(archive: Path) -> dict[str, list[tuple[str, str, str]]]:
    """(stem, class, name) of each split's images in their final order; hidden and other files are left."""
    found: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
    for name in archives.listing(archive):
        split, *rest = name.split("/")
        if split not in found or any(part.startswith(".") for part in rest):
            continue
        if len(rest) != 2 or not IMAGE_NAMES.fullmatch(rest[1]):
            raise UserError(f"{archive.name}: {name!r} is not {split}/<class>/<image>.jpg or .png")
        found[split].append((Path(rest[1]).stem, rest[0], name))
    for split, members in found.items():
        if not members:
            raise UserError(f"{archive.name}: no image {split}/<class>/*.jpg or .png at its top level")
        members.sort()
    return found


def _decode(archive: Path, names: list[str]) -> Array:
    """The named images, uint8 [N, C, H, W]; all must have the size and mode of the archive's first."""
    rows = {name: row for row, name in enumerate(names)}
    images, expected = np.empty(0, np.uint8), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is far lower
        members = archives.contents(archive, set(names))
        for name, content in tqdm(members, "decoding", len(names), leave=False, disable=None):
            pixels = _pixels(f"{archive.name}: {name}", content)
            if expected is None:
                expected = (name, pixels.shape)
                if len(names) * pixels.size > MAX_TOTAL_BYTES:
                    raise UserError(
                        f"{archive.name}: more than {MAX_TOTAL_BYTES} bytes of pixels; set data.train"
                    )
                images = np.empty((len(names), *pixels.shape), np.uint8)
            elif pixels.shape != expected[1]:
                here, there = _shape(pixels.shape), f"{expected[0]} is {_shape(expected[1])}"
                raise UserError(f"{archive.name}: {name} is {here}, but {there}; all must be alike")
            images[rows.pop(name)] = pixels
    if rows:
        raise UserError(f"{archive.name}: changed while it was read; run the stage again")
    return images


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}×{shape[1]} {'RGB' if shape[0] == 3 else 'grayscale'}"


def _pixels(name: str, content: bytes) -> Array:
    """An image as uint8 [C, H, W], C = 1 or 3; refused by its header before its pixels are decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.mode not in ("L", "RGB"):
                raise UserError(f"{name}: mode {image.mode}; convert it to 8-bit grayscale or RGB")
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(
                    f"{name}: {image.width}×{image.height} is more than {MAX_IMAGE_PIXELS} pixels"
                )
            pixels = np.asarray(image)
    except BROKEN_IMAGE as error:
        raise UserError(f"{name}: not a readable JPEG or PNG ({' '.join(str(error).split())})") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
