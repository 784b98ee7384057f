"""Weights come back as they were, equal ones are equal bytes, and a file that lies is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dynat.errors import UserError
from dynat.networks import weights
from dynat.runtime import files


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
