"""A prepared data file on the device, and the augmentation of its images."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from dynat.errors import UserError

SPLITS = ("train", "validation", "test")


class Splits(NamedTuple):
    """Images uint8 [N, C, H, W] and labels int64 [N] of three disjoint splits; validation may be empty."""

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]  # names, by label


def load(path: Path, device: torch.device) -> Splits:
    """Map a file of ``dynat.data.sources.prepare`` and bring it to ``device``.

    Raises ``UserError`` unless names, dtypes, shapes, counts and labels are such as ``prepare`` writes.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            classes = tuple(json.loads((file.metadata() or {})["dynat"])["classes"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the stage prepare") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a data file of the stage prepare ({error!r}); run it again") from error
    if fault := _fault(tensors, len(classes)):
        raise UserError(f"{path}: {fault}; run the stage prepare again")
    return Splits(**{name: tensor.to(device) for name, tensor in tensors.items()}, classes=classes)


def _fault(tensors: dict[str, Tensor], classes: int) -> str | None:
    """What is wrong with the tensors of a data file, or None."""
    names = {f"{split}_{part}" for split in SPLITS for part in ("images", "labels")}
    if set(tensors) != names:
        return f"expected the tensors {sorted(names)}, found {sorted(tensors)}"
    shape = tensors["train_images"].shape[1:]
    for split in SPLITS:
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != shape or 0 in shape:
            return f"{split}_images must be uint8 [N, C, H, W], found {images.dtype} {list(images.shape)}"
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            return f"{split}_labels must be int64 [{len(images)}], found {labels.dtype} {list(labels.shape)}"
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            return f"{split}_labels must lie in 0..{classes - 1}"
        if not len(labels) and split != "validation":
            return f"{split}_images is empty"
    return None


def to_unit(images: Tensor) -> Tensor:
    """Images uint8 as float32 in [0, 1], as torchvision's ``ToTensor`` has them: divided by 255."""
    return images.to(torch.float32) / 255


def augment(
    images: Tensor,
    shifts: Tensor,
    flips: Tensor,
    pad: int,
    mode: Literal["zero", "reflect"] = "zero",
    angles: Tensor | None = None,
) -> Tensor:
    """Pad, crop, flip horizontally, then rotate: each image by its own draws, all at once.

    ``images`` uint8 [B, C, H, W]; ``shifts`` int64 [B, 2], the crop's first row and column in the padded
    image, 0..2·pad (``pad`` leaves the image in place); ``flips`` bool [B]; ``angles`` degrees [B],
    counter-clockwise. The same as torchvision's ``RandomCrop``, ``RandomHorizontalFlip`` and
    ``RandomRotation`` with those draws. Raises ``ValueError`` if ``reflect`` pads beyond the image.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + (shifts[:, :1] - pad)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + (shifts[:, 1:] - pad)
    if mode == "reflect":
        if pad >= min(height, width):
            raise ValueError(f"pad={pad} reflects beyond images of {height}×{width}")
        rows, columns = _reflected(rows, height), _reflected(columns, width)
        images = _pick(images, rows, columns)
    else:
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        images = _pick(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1)) * inside[:, None]
    return images if angles is None else rotate(images, angles)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices mirrored at 0 and ``size - 1``, the edge itself not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``out[b, c, i, j] = images[b, c, rows[b, i], columns[b, j]]``."""
    index = (rows[:, :, None] * images.shape[3] + columns[:, None]).flatten(1)
    picked = images.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1))
    return picked.view(images.shape)


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate uint8 images [B, C, H, W] counter-clockwise by ``angles`` [B], degrees; nearest, zeros outside.

    The geometry of ``torchvision.transforms.functional.rotate``; where a source coordinate falls within
    float32 rounding of the border between two pixels, the other one may be chosen.
    """
    height, width = images.shape[2:]
    radians = torch.deg2rad(angles.to(torch.float32))[:, None, None]
    sine, cosine = radians.sin(), radians.cos()
    x = torch.arange(width, dtype=torch.float32, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, dtype=torch.float32, device=images.device) - (height - 1) / 2)[:, None]
    source_x, source_y = (cosine * x - sine * y) / (width / 2), (sine * x + cosine * y) / (height / 2)
    grid = torch.stack([source_x, source_y], dim=-1)
    turned = F.grid_sample(images.to(torch.float32), grid, "nearest", "zeros", align_corners=False)
    return turned.to(torch.uint8)
