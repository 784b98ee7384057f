"""The prepared file on the device, and the augmentation against plain loops and torchvision."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from dynat.data.splits import augment, load, rotate, to_unit
from dynat.errors import UserError

CPU = torch.device("cpu")


def random_images(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def draws(count: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(pad)
    shifts = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    return shifts, flips, torch.rand(count, generator=generator) * 30 - 15


def test_unit_images_are_those_of_torchvision_to_the_bit() -> None:
    from torchvision.transforms.functional import to_tensor

    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    ours = to_unit(torch.from_numpy(levels).permute(2, 0, 1))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, to_tensor(levels))


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (8, 8, 1), (7, 5, 4), (6, 9, 0)])
def test_augment_equals_pad_crop_flip_of_one_image_at_a_time(
    mode: str, numpy_mode: str, height: int, width: int, pad: int
) -> None:
    images, (shifts, flips, _) = random_images(200, height, width), draws(200, pad)
    expected = []
    for image, (row, column), flip in zip(images.numpy(), shifts.tolist(), flips.tolist(), strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode=numpy_mode)  # type: ignore[call-overload]
        crop = padded[:, row : row + height, column : column + width]
        expected.append(crop[:, :, ::-1] if flip else crop)
    found = augment(images, shifts, flips, pad, mode)  # type: ignore[arg-type]
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), np.stack(expected))


def test_zero_padding_wider_than_the_image_leaves_it_out() -> None:
    images = random_images(2, 4, 4)
    shifts = torch.tensor([[0, 0], [18, 18]])
    assert augment(images, shifts, torch.tensor([False, True]), 9).count_nonzero() == 0


def test_reflection_beyond_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="pad=8 reflects beyond"):
        augment(
            random_images(1, 8, 8), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False]), 8, "reflect"
        )


@pytest.mark.parametrize("size", [32, 8, 9])
def test_rotation_is_torchvisions_but_for_borderline_pixels(size: int) -> None:
    from torchvision.transforms.functional import rotate as reference

    images, (_, _, angles) = random_images(500, size, size), draws(500, 0)
    pairs = zip(images, angles.tolist(), strict=True)
    expected = torch.stack([reference(image, angle) for image, angle in pairs])
    differing = (rotate(images, angles) != expected).any(1).float().mean().item()
    assert differing < 1e-4  # borderline: another rounding of a source coordinate midway between two pixels


def test_rotation_is_counter_clockwise_and_exact_at_right_angles() -> None:
    images = random_images(4, 8, 8)
    turned = rotate(images, torch.tensor([0.0, 90.0, 180.0, -90.0]))
    for image, result, quarters in zip(images, turned, (0, 1, 2, 3), strict=True):
        assert torch.equal(result, torch.rot90(image, quarters, (1, 2)))


def test_rotation_comes_after_crop_and_flip() -> None:
    from torchvision.transforms import functional as reference

    images, pad = random_images(100, 32, 32), 4
    shifts, flips, angles = draws(100, pad)
    expected = []
    for image, (row, column), flip, angle in zip(
        images, shifts.tolist(), flips, angles.tolist(), strict=True
    ):
        crop = reference.crop(reference.pad(image, [pad]), row, column, 32, 32)
        expected.append(reference.rotate(reference.hflip(crop) if flip else crop, angle))
    differing = augment(images, shifts, flips, pad, "zero", angles) != torch.stack(expected)
    assert differing.any(1).float().mean().item() < 1e-4


def test_augment_leaves_its_input_alone() -> None:
    images, (shifts, flips, angles) = random_images(20, 8, 8), draws(20, 2)
    before = images.clone()
    augment(images, shifts, flips, 2, "reflect", angles)
    assert torch.equal(images, before)


def valid() -> dict[str, Tensor]:
    tensors = {}
    for split, count in (("train", 6), ("validation", 0), ("test", 4)):
        tensors[f"{split}_images"] = random_images(count, 4, 5)
        tensors[f"{split}_labels"] = torch.arange(count) % 3
    return tensors


def written(path: Path, tensors: dict[str, Tensor], classes: object = ("a", "b", "c")) -> Path:
    path.write_bytes(save(tensors, {"dynat": json.dumps({"classes": classes})}))
    return path


def test_prepared_file_comes_back_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = valid()
    splits = load(written(tmp_path / "data.safetensors", tensors), CPU)
    assert splits.classes == ("a", "b", "c")
    for name, tensor in tensors.items():
        assert torch.equal(getattr(splits, name), tensor)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("test_labels"), "not a data file"),
        (lambda t: t.update(extra=torch.zeros(1)), "not a data file"),
        (lambda t: t.update(train_images=t["train_images"].float()), "train must have images uint8"),
        (lambda t: t.update(test_images=t["test_images"][:, :1].contiguous()), "test must have images uint8"),
        (lambda t: t.update(test_images=t["test_images"][0]), "test must have images uint8"),
        (lambda t: t.update(train_labels=t["train_labels"].int()), "train must have images uint8"),
        (lambda t: t.update(train_labels=torch.arange(5) % 3), "train must have images uint8"),
        (lambda t: t.update(test_labels=torch.tensor([0, 1, 2, 3])), "test must have images uint8"),
        (lambda t: t.update(test_labels=torch.tensor([0, 1, 2, -1])), "test must have images uint8"),
        (
            lambda t: t.update(test_images=t["test_images"][:0], test_labels=t["test_labels"][:0]),
            "test must have images uint8",
        ),
    ],
)
def test_file_with_wrong_tensors_is_refused_by_name(tmp_path: Path, change: Change, named: str) -> None:
    tensors = valid()
    change(tensors)
    with pytest.raises(UserError, match=named):
        load(written(tmp_path / "data.safetensors", tensors), CPU)


def with_header(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(shape: list[int], end: int) -> bytes:
    return json.dumps({"train_images": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html></html>",
        with_header(b"{}", length=1 << 62),
        with_header(b"{}"),
        with_header(b"not json"),
        with_header(entry([1 << 40, 3, 8, 8], 192), body=bytes(192)),
        with_header(entry([1, 3, 8, 8], 1 << 40), body=bytes(192)),
        with_header(entry([1 << 33, 1 << 33], 0)),
    ],
    ids=["empty", "html", "header too long", "no tensors", "no JSON", "shape", "offsets", "overflow"],
)
def test_file_with_a_lying_header_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.safetensors") as caught:
        load(tmp_path / "data.safetensors", CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [None, 3, ["a"]])
def test_file_with_wrong_classes_is_refused(tmp_path: Path, classes: object) -> None:
    with pytest.raises(UserError):
        load(written(tmp_path / "data.safetensors", valid(), classes), CPU)


def test_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "data.safetensors", valid())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="run it again"):
        load(path, CPU)
    with pytest.raises(UserError, match="run the stage prepare"):
        load(tmp_path / "none.safetensors", CPU)
