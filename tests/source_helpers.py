"""What the tests of data sources share: small archives and a `prepare` that is looked at from outside."""

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dynat.config.params import DataSpec
from dynat.data.sources import prepare
from dynat.errors import UserError

Arrays = dict[str, np.ndarray[Any, Any]]
Files = dict[str, bytes]
random = np.random.default_rng(0)


def prepared(tmp_path: Path, **spec: Any) -> Arrays:
    destination = tmp_path / "prepared" / "data.safetensors"
    prepare(DataSpec(**with_hash(spec)), destination)
    return load_file(destination)


def with_hash(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec of a source, of an image folder with the hash of what lies in the mirror."""
    path = Path(os.environ.get("DYNAT_DATA_MIRROR", ""), spec.get("archive", ""))
    if spec["source"] == "image_folder" and path.exists():
        spec = {"sha256": hash_of(path), **spec}
    return spec


def hash_of(path: Path) -> str:
    """SHA-256 of a file, or of what ``sha256sum`` prints of a folder's files in the order of their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    names = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
    lines = [f"{hash_of(path / name)}  {name}\n" for name in names if "/." not in name]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def as_set(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> set[tuple[bytes, int]]:
    """Images with their labels, in no order."""
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def refused(tmp_path: Path, **spec: Any) -> str:
    """The error of ``prepare``, which must be one line and leave no file but those that lay there."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(DataSpec(**with_hash(spec)), tmp_path / "prepared" / "data.safetensors")
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(*shape: int) -> np.ndarray[Any, Any]:
    return random.integers(0, 256, shape, dtype=np.uint8)


def as_tar(path: Path, files: Files, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def as_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def encoded(pixels: np.ndarray[Any, Any], form: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, form)
    return buffer.getvalue()


def small_set(shape: tuple[int, ...] = (6, 5, 3)) -> tuple[Files, Arrays]:
    """Files in scrambled order, and the arrays that they must become, in whatever order."""
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


FOLDER: dict[str, Any] = {"source": "image_folder", "classes": 2}
