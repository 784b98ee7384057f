"""What a training costs, in multiply-adds, and the refusal of one that would take days on a CPU."""

import time
from pathlib import Path

import torch

from dynat.config.params import Machine, Params
from dynat.errors import UserError
from dynat.methods.step import Engine
from dynat.networks.architectures import build, multiply_adds
from dynat.runtime import distributed
from dynat.runtime import machine as environment

LIMIT_HOURS = 12.0  # longer than this on a CPU is a mistake unless ``machine.device=cpu`` insists
Shape = tuple[int, int, int]  # channels, height, width of an image


def refuse_selected(params: Params, root: Path = Path()) -> None:
    """Refuse what :func:`refuse_days_on_cpu` does before anything is downloaded, as far as params.yaml tells.

    Nothing is said of an image folder, whose size only the archive knows; of a setting whose data is there,
    for then its own training refuses at once; nor of a training whose result is there to be evaluated.
    """
    for setting in params.settings:
        study = params.study[setting]
        shape, count = study.data.image_shape, study.data.training_images
        here = study.machine.device == "auto" and not torch.cuda.is_available()
        if shape is None or count is None or not here or (root / f"data/{setting}.safetensors").exists():
            continue
        precision = environment.precision_of(study.train, torch.device("cpu"))
        for method in (*params.baselines, *params.variants):
            if all((root / f"models/{setting}/{method}/{seed}").is_dir() for seed in params.seeds):
                continue
            recipe = params.recipe(setting, method)
            networks = [
                build(spec.name, study.data.classes, shape[0], **spec.options)
                for spec in (study.target, study.guide)[: 1 + recipe.needs_guide]
            ]
            engine = Engine(recipe, networks[0], networks[1] if recipe.needs_guide else None, precision)
            refuse_days_on_cpu(setting, study.machine, engine, shape, count)


def refuse_days_on_cpu(setting: str, machine: Machine, engine: Engine, shape: Shape, count: int) -> None:
    """Raise :class:`UserError` if training on ``count`` images keeps this CPU busy beyond ``LIMIT_HOURS``.

    The hours are a lower bound: convolutions at the speed of a matrix product, no evaluation, no burn-in's
    end. Nothing is refused where ``machine.device=cpu`` insists.
    """
    if engine.device.type != "cpu" or machine.device != "auto":
        return
    engine.set_epoch(0)
    work = work_per_image(engine, shape) * count * engine.recipe.schedule.epochs
    hours = work / measured_peak(engine.precision) / distributed.size() / 3600
    if hours > LIMIT_HOURS:
        raise UserError(
            f"{setting}: no accelerator here, and this CPU would train for at least {hours / 24:.1f} days; "
            f"run it on a GPU, take it out of settings, or insist with -S study.{setting}.machine.device=cpu"
        )


def work_per_image(engine: Engine, shape: Shape) -> int:
    """Multiply-adds that the method needs for one image in the engine's epoch.

    1 forward of the guide and 2 for its backward; per inner step 1 forward and 1 backward to the input; per
    outer forward that the loss reads 1 and 2 for its backward; 1 for a forward that only moves batch-norm
    statistics; the natural prediction of a KL attack once.
    """
    recipe = engine.recipe
    forwards = 2 * recipe.inner.steps + (recipe.inner.loss == "kl")
    forwards += recipe.inner.mode == "train" and recipe.inner.steps > 0  # the published loss check
    learning = recipe.outer.reads_natural + recipe.outer.reads_adversarial
    forwards += 3 * learning + (len(engine.order) - learning) + engine.forwards_after
    if recipe.awp is not None and engine.epoch >= recipe.awp.begin:
        forwards += 3 * (recipe.awp.objective.reads_natural + recipe.awp.objective.reads_adversarial)
    total = forwards * multiply_adds(engine.target, shape)
    return total if engine.guide is None else total + 3 * multiply_adds(engine.guide, shape)


def measured_peak(precision: torch.dtype, size: int = 1024) -> float:
    """Multiply-adds per second of a matrix product of ``size`` squared on this CPU, best of three."""
    a = torch.rand(size, size).to(precision)
    a @ a
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return size**3 / min(seconds)
