"""Speed of a training step: the project's engine against the algorithm as published, in one run.

Both sides take the same batches in turn; a round's ratio is (time of the published step) / (time of the
engine's), so that whatever else slows the machine slows both. Model FLOPs are two per multiply-add that the
method needs (``work_per_image``). Peak: the best of several large matrix products in the
engine's precision, measured in the same run.

    python -m benchmarks.train_step --network resnet18 --batch 32 --method dynat_inner
    python -m benchmarks.train_step --costs            # every recipe's step relative to pgd_at
"""

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import STEPS, Published
from dynat.config.params import load
from dynat.config.recipe import Recipe
from dynat.methods.batches import Batch
from dynat.methods.step import Engine
from dynat.networks.architectures import build
from dynat.runtime.machine import precision_of

NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int, int]]] = {
    # target, guide, image; both ResNet-18 with the strides that DYNAT's code gives its guide
    "resnet18": (
        {"name": "resnet", "strides": [1, 1, 2, 2]},
        {"name": "resnet", "strides": [1, 1, 2, 2]},
        (3, 32, 32),
    ),
    "wrn34_10": ({"name": "wrn"}, {"name": "resnet", "strides": [1, 1, 2, 2]}, (3, 32, 32)),
    "cnn": (
        {"name": "cnn", "width": 32, "stem_stride": 2},
        {"name": "cnn", "width": 32, "stem_stride": 2},
        (1, 8, 8),
    ),
}
CLASSES = 10
Step = Callable[[Batch], object]


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    precision = precision_of(arguments.precision, device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _describe(device, precision, arguments)
    if arguments.costs:
        costs(arguments, device, precision)
    else:
        compare(arguments, device, precision)


def compare(arguments: argparse.Namespace, device: torch.device, precision: torch.dtype) -> None:
    """The published step and the engine's in turn."""
    method, size = arguments.method, arguments.batch
    recipe = load().recipes[method]
    if method not in STEPS:
        sys.exit(f"error: --method {method} has no transcription: choose one of {', '.join(STEPS)}")
    target, guide, shape = networks(arguments.network, recipe, device)
    published = Published(method, recipe, copy.deepcopy(target), copy.deepcopy(guide))
    engine = engine_of(recipe, target, guide, precision, arguments.compile)
    steps: dict[str, Step] = {"published": published.step, "engine": engine.step}
    if arguments.compile:
        twins = copy.deepcopy(target), copy.deepcopy(guide)
        steps["uncompiled"] = engine_of(recipe, *twins, precision).step
    timed = Stopwatch(device, arguments.clock)
    times: dict[str, list[float]] = {name: [] for name in steps}
    data = batches(recipe, shape, size, 2, device)
    for number in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds = timed(step, data[number % 2])
            if number:  # the first round warms up
                times[name].append(seconds)
    ours = times.pop("engine")
    seconds, flops = statistics.median(ours), 2 * work_per_image(engine, shape) * size
    peak = matrix_peak(timed, device, precision)
    for name, others in times.items():
        ratios = sorted(a / b for a, b in zip(others, ours, strict=True))
        print(
            f"{name:10} {size / statistics.median(others):9.2f} images/s; engine's ratio to it "
            f"{statistics.median(ratios):.2f} ({len(ratios)} rounds, {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    print(f"engine     {size / seconds:9.2f} images/s")
    print(f"model      {flops / size / 1e9:9.2f} GFLOP/image")
    print(f"peak       {peak / 1e9:9.1f} GFLOP/s, matrix product, {precision}")
    print(f"floor      {flops / peak:9.3f} s/step; measured {seconds:.3f} s: {flops / seconds / peak:.1%}")


def costs(arguments: argparse.Namespace, device: torch.device, precision: torch.dtype) -> None:
    """The step of every recipe of params.yaml relative to pgd_at, past every burn-in."""
    recipes = load().recipes
    steps: dict[str, Step] = {}
    work, data = {}, {}
    for name, recipe in recipes.items():
        target, guide, shape = networks(arguments.network, recipe, device)
        engine = engine_of(recipe, target, guide, precision)
        engine.set_epoch(recipe.schedule.epochs - 1)
        steps[name], work[name] = engine.step, work_per_image(engine, shape)
        data[name] = batches(recipe, shape, arguments.batch, 1, device)[0]
    timed = Stopwatch(device, arguments.clock)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds = timed(step, data[name])
            if round_:
                times[name].append(seconds)
    base = times["pgd_at"]
    print(f"{'recipe':22}  images/s  cost/pgd_at  FLOPs/pgd_at")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        rate = arguments.batch / statistics.median(own)
        print(f"{name:22}  {rate:8.2f}  {ratio:11.2f}  {work[name] / work['pgd_at']:12.2f}")


def multiply_adds(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Return the multiply-adds of all convolutions and linear layers for one image (channels, height, width).

    Counted in one forward of a copy in eval mode: neither mode nor statistics of the model move.
    """
    counts: list[int] = []  # by hooks: torch.utils.flop_counter imports 5 s of compiler first

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output.numel() * layer.get_parameter("weight")[0].numel())

    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    weight = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, *input_shape, device=weight.device, dtype=weight.dtype))
    return sum(counts)


def work_per_image(engine: Engine, shape: tuple[int, int, int]) -> int:
    """Multiply-adds that the method needs for one image [C, H, W] in the engine's epoch.

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


def networks(
    name: str, recipe: Recipe, device: torch.device
) -> tuple[nn.Module, nn.Module | None, tuple[int, int, int]]:
    """Contiguous target, guide (or None) and the shape of an image."""
    first, second, shape = NETWORKS[name]
    torch.manual_seed(0)
    target, guide = (
        build(num_classes=CLASSES, in_channels=shape[0], **options).to(device) for options in (first, second)
    )
    return target, guide if recipe.needs_guide else None, shape


def engine_of(
    recipe: Recipe,
    target: nn.Module,
    guide: nn.Module | None,
    precision: torch.dtype,
    compiled: bool = False,
) -> Engine:
    """The engine as stages/train.py sets it up."""
    for network in (target, guide):
        if network is not None:
            network.to(memory_format=torch.channels_last)
    engine = Engine(recipe, target, guide, precision, fold=True, compiled=compiled)
    engine.set_epoch(1)
    return engine


def batches(
    recipe: Recipe, shape: tuple[int, int, int], size: int, count: int, device: torch.device
) -> list[Batch]:
    """Random images and labels with the draws that the recipe asks for."""
    stream = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        images = torch.rand((size, *shape), generator=stream)
        truth = torch.randint(CLASSES, (size,), generator=stream)
        draw = torch.rand if recipe.inner.start == "uniform" else torch.randn
        start, jitter = draw(images.shape, generator=stream), None
        if recipe.inner.stop is not None and recipe.inner.stop.noise > 0:
            jitter = torch.randn((recipe.inner.steps, *images.shape), generator=stream).to(device)
        made.append(Batch(images.to(device), truth.to(device), start.to(device), jitter))
    return made


class Stopwatch:
    """Seconds of a call: of the wall, the device's queue emptied before and after, or of this processor.

    Processor seconds are for a CPU that others use at the same time; with one thread they are what the
    wall clock would show on a quiet machine.
    """

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device = device
        self.clock = time.process_time if clock == "cpu" else time.perf_counter

    def __call__(self, step: Callable[..., object], *arguments: object) -> float:
        """Run ``step(*arguments)`` and return its seconds."""
        self._synchronise()
        start = self.clock()
        step(*arguments)
        self._synchronise()
        return self.clock() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_peak(timed: Stopwatch, device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    timed(torch.mm, a, b)
    return 2 * size**3 / min(timed(torch.mm, a, b) for _ in range(10))


def _describe(device: torch.device, precision: torch.dtype, arguments: argparse.Namespace) -> None:
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{arguments.network}, batch {arguments.batch}, {precision}; {platform.machine()} {capability}, "
        f"{torch.get_num_threads()} threads, {arguments.clock} clock, accelerator {accelerator}; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--method", default="dynat_inner", help="a recipe of params.yaml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="see Stopwatch")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="train.compile=true for the engine, and its ratio to that without",
    )
    parser.add_argument("--costs", action="store_true", help="every recipe relative to pgd_at instead")
    arguments = parser.parse_args()
    if arguments.costs and arguments.compile:
        parser.error("--costs compiles nothing: leave out --compile")
    return arguments


if __name__ == "__main__":
    main()
