"""What the tests of data sources share: small archives and a `prepare` that is looked at from outside."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dynat.config.params import DataSpec
from dynat.data.sources import prepare
from dynat.errors import UserError

Arrays = dict[str, np.ndarray[Any, Any]]
Files = dict[str, bytes]
random = np.random.default_rng(0)


def prepared(tmp_path: Path, **spec: Any) -> Arrays:
    destination = tmp_path / "prepared" / "data.safetensors"
    prepare(DataSpec(**spec), destination)
    return load_file(destination)


def refused(tmp_path: Path, **spec: Any) -> str:
    """The error of ``prepare``, which must be one line and leave no file but those that lay there."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(DataSpec(**spec), tmp_path / "prepared" / "data.safetensors")
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
