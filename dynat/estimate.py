"""How long a training would take here, so that days on a CPU are refused before they begin."""

import time

import torch
from torch import nn

from dynat.errors import UserError
from dynat.networks import multiply_adds
from dynat.recipes import Recipe

LIMIT_HOURS = 12.0  # longer than this on a CPU is a mistake unless ``machine.device=cpu`` insists


def multiply_adds_per_image(
    recipe: Recipe, target: nn.Module, guide: nn.Module | None, shape: tuple[int, int, int]
) -> int:
    """Multiply-adds of one training image: a backward to the input costs one forward, a full one two."""
    forwards = 2 * recipe.inner.steps + 3  # inner forwards and backwards, then the training forward
    forwards += recipe.inner.loss == "kl"
    if recipe.outer.natural_ce or recipe.outer.beta > 0:
        forwards += 3
    if recipe.awp is not None:
        forwards += 3 * (1 + (recipe.awp.objective.beta > 0))
    total = forwards * multiply_adds(target, shape)
    return total + (3 * multiply_adds(guide, shape) if guide is not None else 0)


def measured_peak(device: torch.device, size: int = 1024) -> float:
    """Multiply-adds per second of a float32 matrix product of ``size`` squared, best of three."""
    a = torch.rand(size, size, device=device)
    a @ a
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return size**3 / min(seconds)


def refuse_days_on_cpu(setting: str, total: float, device: torch.device) -> None:
    """Raise :class:`UserError` if ``total`` multiply-adds would keep this CPU busy for too long."""
    hours = total / measured_peak(device) / 3600
    if hours > LIMIT_HOURS:
        raise UserError(
            f"{setting}: no accelerator here, and this CPU would train for at least {hours / 24:.1f} days; "
            f"run it on a GPU, or insist with -S study.{setting}.machine.device=cpu"
        )
