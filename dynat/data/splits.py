"""A prepared data file on the device, and the augmentation of its images."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from dynat.errors import UserError


class Splits(NamedTuple):
    """Images uint8 [N, C, H, W] and labels int64 [N] of three disjoint splits; validation may be empty."""

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]  # names, by label
    notes: tuple[str, ...] = ()  # what must stand beside every number from this data


def load(path: Path, device: torch.device) -> Splits:
    """Map a file of ``dynat.data.sources.prepare`` and bring it to ``device``.

    Raises ``UserError`` unless names, dtypes, shapes, counts and labels are such as ``prepare`` writes.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            description = json.loads((file.metadata() or {})["dynat"])
        classes = tuple(description["classes"])
        data = Splits(**tensors, classes=classes, notes=tuple(description.get("notes", ())))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the stage prepare") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a data file of the stage prepare ({error!r}); run it again") from error
    for split in ("train", "validation", "test"):
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        like_train = images.dim() == 4 and images.shape[1:] == data.train_images.shape[1:]
        labelled = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
        in_range = not labels.numel() or 0 <= labels.min() <= labels.max() < len(classes)
        enough = images.numel() > 0 or split == "validation"
        if not (images.dtype == torch.uint8 and like_train and labelled and in_range and enough):
            wanted = f"images uint8 [N, C, H, W] and labels int64 [N] in 0..{len(classes) - 1}"
            raise UserError(f"{path}: {split} must have {wanted}; run the stage prepare again")
    return data._replace(**{name: tensor.to(device) for name, tensor in tensors.items()})


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
        rows, columns = (  # mirrored at 0 and the last, the edge itself not repeated
            last - (last - index.abs()).abs() for index, last in ((rows, height - 1), (columns, width - 1))
        )
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    picked = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    images = picked.view(images.shape) * inside[:, None]
    return images if angles is None else rotate(images, angles)


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
