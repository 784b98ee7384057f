"""Speed of a training step: the project's engine against the algorithm as published, in one run.

Both sides take the same batches in turn; a round's ratio is (time of the published step) / (time of the
engine's), so that whatever else slows the machine slows both. The engine is set up as stage ``train`` does:
deterministic, channels-last. The published step is what the authors' code gets from PyTorch's defaults:
contiguous, kernels chosen by heuristics and on CUDA, where it is there, TF32 in convolutions. Model FLOPs
are two per multiply-add that the method needs (``work_per_image``). Peak: the best of several large matrix
products in the precision, measured in the same run.

    python -m benchmarks.train_step --network resnet18 --batch 32 --method dynat_inner
    python -m benchmarks.train_step --network wrn34_10 --batch 128 --engines eager,graph --precisions bf16
    python -m benchmarks.train_step --costs            # every recipe's step relative to pgd_at
"""

import argparse
import copy
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import STEPS, Published
from benchmarks.timing import PRECISIONS, Stopwatch, listed, refuse_unknown
from dynat.config.params import Machine, load
from dynat.config.recipe import Precision, Recipe
from dynat.methods.batches import Batch
from dynat.methods.captured import WARM_UP, CapturedSteps
from dynat.methods.step import Engine
from dynat.networks.architectures import build
from dynat.runtime import machine

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
# eager-graph: the graph of the eager step; graph: that of the step whose folded copy is compiled
ENGINES = ("eager", "compiled", "eager-graph", "graph")
Step = Callable[[Batch], object]


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    machine.pin(Machine(device=arguments.device, threads=arguments.threads))
    device = machine.device_of(Machine(device=arguments.device, threads=arguments.threads), "--device")
    _describe(device, arguments)
    if arguments.costs:
        costs(arguments, device)
    else:
        compare(arguments, device)


@dataclass
class Side:
    """One way to take a step, and what its rounds took."""

    name: str
    precision: Precision
    step: Step
    published: bool = False
    kernels: float = 0.0  # seconds of the device's kernels in a step, by the profiler; CPU: 0
    peak: int = 0  # bytes of the device's memory, beyond those in use before it was made
    seconds: list[float] = field(default_factory=list)  # of a step, until the device has done it
    host: list[float] = field(default_factory=list)  # until this process had handed it over


def compare(arguments: argparse.Namespace, device: torch.device) -> None:
    """The published step and those of the engine in turn."""
    method, size = arguments.method, arguments.batch
    recipe = load().recipes[method]
    if method not in STEPS:
        sys.exit(f"error: --method {method} has no transcription: choose one of {', '.join(STEPS)}")
    if recipe.inner.mode == "train" and (odd := {"compiled", "graph"}.intersection(arguments.engines)):
        text = f"{method} attacks in train mode, where nothing is compiled; choose eager or eager-graph"
        sys.exit(f"error: --engines {min(odd)}: {text}")
    target, guide, shape = networks(arguments.network, recipe, device)
    timed, data = Stopwatch(device, arguments.clock), batches(recipe, shape, size, 2, device)
    sides: list[Side] = []

    def add(name: str, precision: Precision, make: Callable[[nn.Module, nn.Module | None], Step]) -> None:
        """Make a side of its own copies, and take the steps after which it has all it needs."""
        before = timed.memory()
        side = Side(name, precision, make(copy.deepcopy(target), copy.deepcopy(guide)), name == "published")
        with as_it_runs(side):
            for number in range(WARM_UP + 2):
                side.step(data[number % 2])
        side.peak = timed.memory(peak=True) - before
        sides.append(side)

    published_in: Precision = machine.precision_of("auto", device)
    add("published", published_in, lambda *both: Published(method, recipe, *both).step)
    for precision in dict.fromkeys(machine.precision_of(each, device) for each in arguments.precisions):
        for name in arguments.engines:
            products = torch.bfloat16 if precision == "bf16" else torch.float32
            compiled = name in ("compiled", "graph")

            def make(
                target: nn.Module,
                guide: nn.Module | None,
                name: str = name,
                products: torch.dtype = products,
                compiled: bool = compiled,
            ) -> Step:
                engine = engine_of(recipe, target, guide, products, compiled)
                graph = name.endswith("graph") and device.type == "cuda"
                return CapturedSteps(engine, size) if graph else engine.step

            add(name, precision, make)
    for _ in range(arguments.rounds):
        for side in sides:
            with as_it_runs(side):
                host, seconds = timed.both(side.step, data[0], count=arguments.steps)
            side.host.append(host)
            side.seconds.append(seconds)
    for side in sides:  # after all that is timed, which a profiler may slow
        with as_it_runs(side):
            side.kernels = timed.kernels(side.step, data[0])
    engine = engine_of(recipe, target, guide, torch.float32)
    report(sides, 2 * work_per_image(engine, shape) * size, size, peaks(sides, timed, device))


def peaks(sides: list[Side], timed: Stopwatch, device: torch.device) -> dict[Precision, float]:
    """FLOP/s of the best matrix product in each precision that a side has."""
    return {
        precision: matrix_peak(timed, device, precision) for precision in {each.precision for each in sides}
    }


def report(sides: list[Side], flops: int, size: int, peak: dict[Precision, float]) -> None:
    """A line for each side: its rate, the ratio to the first with its spread, where the time goes."""
    print(f"model {flops / size / 1e9:.3g} GFLOP/image; peak of a matrix product, TFLOP/s: ", end="")
    print(", ".join(f"{name} {value / 1e12:.3g}" for name, value in sorted(peak.items())))
    print(
        "side           precision  images/s  ratio (of rounds)      ms/step  host ms  kernel ms  of peak  GiB"
    )
    for side in sides:
        pairs = zip(sides[0].seconds, side.seconds, strict=True)
        ratios = sorted(first / own for first, own in pairs)
        seconds, host = statistics.median(side.seconds), statistics.median(side.host)
        spread = f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(
            f"{side.name:14} {side.precision:9} {size / seconds:9.1f}  {spread:21} {1e3 * seconds:8.2f} "
            f"{1e3 * host:8.2f} {1e3 * side.kernels:10.2f}  {flops / seconds / peak[side.precision]:7.1%} "
            f"{side.peak / 2**30:5.2f}",
            flush=True,
        )


@contextmanager
def as_it_runs(side: Side) -> Iterator[None]:
    """The switches of the process as the published code or a stage has them."""
    torch.set_deterministic_debug_mode("default" if side.published else "error")
    with machine.convolutions(side.precision):
        yield
    torch.set_deterministic_debug_mode("error")


def costs(arguments: argparse.Namespace, device: torch.device) -> None:
    """The step of every recipe of params.yaml relative to pgd_at, past every burn-in."""
    recipes, precision = load().recipes, machine.precision_of(arguments.precisions[0], device)
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    steps: dict[str, Step] = {}
    work, data = {}, {}
    for name, recipe in recipes.items():
        target, guide, shape = networks(arguments.network, recipe, device)
        engine = engine_of(recipe, target, guide, products)
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

    1 forward of the guide and 2 for its backward, unless it is frozen; per inner step 1 forward and 1
    backward to the input; per outer forward that the loss reads 1 and 2 for its backward; 1 for a forward
    that only moves batch-norm statistics; the natural prediction of a KL attack once.
    """
    recipe = engine.recipe
    forwards = 2 * recipe.inner.steps + (recipe.inner.loss == "kl")
    forwards += recipe.inner.mode == "train" and recipe.inner.steps > 0 and recipe.inner.loss_check
    learning = sum(recipe.outer.reads.values())
    forwards += 3 * learning + (len(engine.order) - learning) + engine.forwards_after
    if recipe.awp is not None and engine.epoch >= recipe.awp.begin:
        forwards += 3 * (recipe.awp.objective.reads_natural + recipe.awp.objective.reads_adversarial)
    total = forwards * multiply_adds(engine.target, shape)
    return (
        total if engine.guide is None else total + guide_passes(recipe) * multiply_adds(engine.guide, shape)
    )


def guide_passes(recipe: Recipe) -> int:
    """Forwards of the guide for one image, a backward to its input counting 1, one to its weights 2."""
    if not recipe.frozen_guide:
        return 3
    attacked = {"kl_guide_moving": 2 * recipe.inner.steps, "kl_guide_linear": 2}.get(recipe.inner.loss, 0)
    return 1 + recipe.reads_guide_at_adversarial + (recipe.outer.soft.gradient > 0) + attacked


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


def matrix_peak(timed: Stopwatch, device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large square matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048 if precision == "fp32" else 256  # in software
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(products) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    timed(torch.mm, a, b)
    best = min(timed(torch.mm, a, b) for _ in range(10))
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * size**3 / best


def _describe(device: torch.device, arguments: argparse.Namespace) -> None:
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{arguments.method}, {arguments.network}, batch {arguments.batch}; {platform.machine()} "
        f"{capability}, "
        f"{torch.get_num_threads()} threads, {arguments.clock} clock, accelerator {accelerator}; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--method", default="dynat_inner", help="a recipe of params.yaml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", type=listed, default=["auto"], help="of auto, fp32, tf32, bf16")
    parser.add_argument("--engines", type=listed, default=["eager"], help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of a round, before the device is waited for")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="see Stopwatch")
    parser.add_argument("--costs", action="store_true", help="every recipe relative to pgd_at instead")
    arguments = parser.parse_args()
    refuse_unknown(parser, "precisions", arguments.precisions, PRECISIONS)
    refuse_unknown(parser, "engines", arguments.engines, ENGINES)
    return arguments


if __name__ == "__main__":
    main()
