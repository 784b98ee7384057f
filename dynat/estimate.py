"""How long a training would take here, so that days on a CPU are refused before they begin."""

import time

import torch

from dynat.errors import UserError
from dynat.networks import multiply_adds
from dynat.params import Machine
from dynat.step import Engine
from dynat.training import Training

LIMIT_HOURS = 12.0  # longer than this on a CPU is a mistake unless ``machine.device=cpu`` insists


def refuse_days_on_cpu(setting: str, machine: Machine, training: Training) -> None:
    """Raise :class:`UserError` if a training would keep this CPU busy for longer than ``LIMIT_HOURS``.

    Nothing is refused where ``machine.device=cpu`` insists.
    """
    engine, images = training.engine, training.data.train_images
    if engine.device.type != "cpu" or machine.device != "auto":
        return
    count, *shape = images.shape
    work = multiply_adds_per_image(engine, (shape[0], shape[1], shape[2])) * count
    hours = work * engine.recipe.schedule.epochs / measured_peak(engine.device) / 3600
    if hours > LIMIT_HOURS:
        raise UserError(
            f"{setting}: no accelerator here, and this CPU would train for at least {hours / 24:.1f} days; "
            f"run it on a GPU, or insist with -S study.{setting}.machine.device=cpu"
        )


def multiply_adds_per_image(engine: Engine, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one training image: a backward to the input costs one forward, a full one two."""
    recipe = engine.recipe
    forwards = 2 * recipe.inner.steps + 3  # inner forwards and backwards, then the training step
    forwards += recipe.inner.loss == "kl"
    if recipe.outer.natural_ce or recipe.outer.beta > 0:
        forwards += 3
    if recipe.awp is not None:
        forwards += 3 * (1 + (recipe.awp.objective.beta > 0))
    total = forwards * multiply_adds(engine.target, shape)
    return total if engine.guide is None else total + 3 * multiply_adds(engine.guide, shape)


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
