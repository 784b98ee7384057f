"""Nothing half-written is ever read, and nothing that was finished is lost."""

import errno
import json
import os
import resource
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynat.errors import UserError
from dynat.networks import weights
from dynat.runtime import files, resume


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Files


def test_a_write_that_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_atomically(path, b"old")
    with file_size_limit(1000), pytest.raises(UserError, match=r"metrics\.json: File too large"):
        files.write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "read-only"), (errno.EACCES, "write permission")],
)
def test_a_full_or_closed_disk_is_one_line_with_the_path_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    def refuse(file: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError) as caught:
        files.write_atomically(tmp_path / "out.json", b"new")
    message = str(caught.value)
    assert str(tmp_path / "out.json") in message
    assert advice in message
    assert "\n" not in message
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_swept_by_the_next_and_a_living_writers_file_is_not(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".out.json.{pid}.tmp").write_bytes(b"half")
    files.write_atomically(tmp_path / "out.json", b"whole")
    assert sorted(os.listdir(tmp_path)) == [f".out.json.{os.getppid()}.tmp", "out.json"]


def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_json_keeps_the_order_of_keys_and_ends_in_a_newline(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"z": 1, "a": {"ε": "8/255"}})
    assert (tmp_path / "a.json").read_text(
        encoding="utf-8"
    ) == '{\n "z": 1,\n "a": {\n  "ε": "8/255"\n }\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("-inf")])
def test_no_number_is_published_that_is_not_one(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"fine": 1})
    with pytest.raises(UserError, match=r"a\.json: not written, best\.1\.pgd20 is (nan|inf|-inf)"):
        files.write_json(path, {"best": [{"pgd20": 51.0}, {"pgd20": value}]})
    with pytest.raises(UserError, match=r"a\.csv: not written, 1\.loss is"):
        files.write_csv(tmp_path / "a.csv", [{"loss": 1.0}, {"loss": value}])
    assert json.loads(path.read_text()) == {"fine": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_csv_columns_come_in_order_of_appearance_and_numbers_to_the_last_bit(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "a.csv", [{"epoch": 0, "lr": 0.1}, {"epoch": 1, "lr": 1 / 3, "guide": 2.5}])
    assert (tmp_path / "a.csv").read_bytes() == b"epoch,lr,guide\n0,0.1,\n1,0.3333333333333333,2.5\n"


# Weights


def test_weights_come_back_as_they_were_with_their_metadata(tmp_path: Path) -> None:
    shared = torch.randn(2, 3)
    state = {
        "conv": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 2).t().requires_grad_(),
        "tied.a": shared,
        "tied.b": shared,
        "batches": torch.tensor(7),
    }
    weights.save_weights(tmp_path / "w.safetensors", state, {"network": '{"k": 1}', "epoch": "3"})
    found, metadata = weights.load_weights(tmp_path / "w.safetensors")
    assert metadata == {"network": '{"k": 1}', "epoch": "3"}
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_equal_weights_and_metadata_are_equal_bytes_in_any_order(tmp_path: Path) -> None:
    state = {f"layer{i}": torch.full((i,), float(i)) for i in range(9)}
    metadata = {f"key{i}": str(i) for i in range(9)}  # nine keys: safetensors would shuffle them each time
    written = set()
    for turn in range(10):
        path = tmp_path / f"{turn}.safetensors"
        order = list(state)[turn:] + list(state)[:turn]
        weights.save_weights(path, {name: state[name] for name in order}, dict(reversed(metadata.items())))
        written.add(files.sha256(path))
    assert len(written) == 1


def lying(header: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<!DOCTYPE html><title>404</title>", id="a web page"),
        pytest.param(b"\x80\x04cposix\nsystem\n(S'true'\ntR.", id="a pickle"),
        pytest.param(lying({"w": entry([4], 0, 16)}, bytes(12)), id="data shorter than the header says"),
        pytest.param(lying({"w": entry([4], 0, 16)}, bytes(20)), id="data longer than the header says"),
        pytest.param(lying({"w": entry([5], 0, 16)}, bytes(16)), id="shape larger than its data"),
        pytest.param(lying({"w": entry([2**62, 4], 0, 16)}, bytes(16)), id="shape that overflows"),
        pytest.param(
            lying({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)), id="overlapping tensors"
        ),
        pytest.param(lying({"w": entry([4], 0, 16)}, bytes(16), length=2**60), id="header of an exabyte"),
        pytest.param(lying(b"[" * 100_000, bytes(16)), id="header nested without end"),
        pytest.param(lying({"w": entry([-1], 0, 4)}, bytes(4)), id="negative shape"),
        pytest.param(
            lying({"__metadata__": {"dynat": "[1"}, "w": entry([1], 0, 4)}, bytes(4)), id="metadata not JSON"
        ),
        pytest.param(
            lying({"__metadata__": {"dynat": "7"}, "w": entry([1], 0, 4)}, bytes(4)), id="metadata a number"
        ),
    ],
)
def test_a_weights_file_that_lies_is_refused_in_one_line_with_its_path(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors: not a sound safetensors file") as caught:
        weights.load_weights(path)
    assert "\n" not in str(caught.value)


def test_weights_cut_at_any_byte_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, {"w": torch.arange(6.0)}, {"epoch": "1"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            weights.load_weights(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        weights.load_weights(tmp_path / "gone.safetensors")


# Keys


def test_resume_key_changes_with_every_part_and_not_with_their_order() -> None:
    parts = {"params": "a", "data": "b", "code": "c"}
    key = resume.resume_key(parts)
    assert resume.resume_key(dict(reversed(parts.items()))) == key
    others = [{**parts, name: "x"} for name in parts] + [
        {"params": "a"},
        {"params": "ab", "data": "", "code": "c"},
    ]
    assert len({key, *(resume.resume_key(other) for other in others)}) == 6
