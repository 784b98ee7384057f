"""The batches of a training and everything random about them: a function of (seed, epoch) alone.

So an epoch is repeated exactly without the state of any loader or generator, and all processes draw alike.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dynat.config.recipe import Recipe
from dynat.config.train import Train
from dynat.data.splits import Splits, augment, to_unit
from dynat.runtime import distributed


class Batch(NamedTuple):
    """A training batch, or a process's slice of it, and its random draws; these are unscaled."""

    images: Tensor  # float32 [B,C,H,W] in [0,1]
    truth: Tensor  # int64 [B]
    start: Tensor  # [B,C,H,W], uniform in [0,1) or standard normal, as the recipe's start asks
    jitter: Tensor | None  # standard normal [steps,B,C,H,W], only for a recipe with inner.stop.noise


def batches(data: Splits, recipe: Recipe, train: Train, seed: int, epoch: int) -> Iterator[Batch]:
    """This process's slices of the training batches; the last may be smaller (docs/methods.md, section 1)."""
    images, labels, inner = data.train_images, data.train_labels, recipe.inner
    device, count = images.device, len(images)
    small = generator(torch.device("cpu"), seed, epoch, "batches")  # the same on every device
    noise = generator(device, seed, epoch, "noise")
    order = torch.randperm(count, generator=small)
    shifts = torch.randint(0, 2 * train.pad + 1, (count, 2), generator=small)
    flips = (torch.rand(count, generator=small) < 0.5) & torch.tensor(train.flip)
    angles = (2 * torch.rand(count, generator=small) - 1) * recipe.rotation
    order, shifts, flips, angles = (drawn.to(device) for drawn in (order, shifts, flips, angles))
    draw = torch.rand if inner.start == "uniform" else torch.randn
    for whole in order.split(train.batch):
        part = distributed.part(len(whole))
        index = whole[part]
        rotations = angles[index] if recipe.rotation else None
        moved = augment(images[index], shifts[index], flips[index], train.pad, recipe.padding, rotations)
        shape = (len(whole), *moved.shape[1:])  # drawn for all processes alike
        jitter = None
        if inner.stop is not None and inner.stop.noise > 0:
            jitter = torch.randn((inner.steps, *shape), generator=noise, device=device)[:, part]
        start = draw(shape, generator=noise, device=device)[part]
        yield Batch(to_unit(moved), labels[index], start, jitter)


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator on ``device`` whose stream is a function of ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
