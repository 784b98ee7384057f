"""Crafting: a step of an attack on a folded copy, and a forward alone, in each layout and precision.

What an evaluation spends its time on: forward and gradient to the input, and the forward that judges. The
layouts alternate in one process.

    python -m benchmarks.crafting --network resnet18 --batches 100,500,1000 --precisions fp32,tf32,bf16
"""

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.autoattack import NETWORKS
from benchmarks.timing import PRECISIONS, Stopwatch, listed, refuse_unknown
from dynat.config.params import Machine
from dynat.config.recipe import Precision
from dynat.networks.architectures import build
from dynat.networks.folded import crafting_copy
from dynat.runtime import machine

LAYOUTS: dict[str, Any] = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def main() -> None:
    """Print milliseconds of a step and of a forward, the median over rounds."""
    arguments = _arguments()
    asked = Machine(device=arguments.device, threads=arguments.threads)
    machine.pin(asked)
    device = machine.device_of(asked, "--device")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{arguments.network} on {where}, torch {torch.__version__}; ms of a step and of a forward")
    print(f"batch  precision  {'  '.join(f'{name:>19}' for name in LAYOUTS)}")
    torch.manual_seed(0)
    network = build(num_classes=10, in_channels=3, **NETWORKS[arguments.network]).to(device)
    network.eval().requires_grad_(False)
    for size in map(int, arguments.batches):
        images = torch.rand(size, 3, 32, 32, device=device)
        for precision in dict.fromkeys(machine.precision_of(each, device) for each in arguments.precisions):
            found = measure(network, images, precision, arguments.rounds, Stopwatch(device, arguments.clock))
            columns = "  ".join(f"{1e3 * step:9.2f} {1e3 * forward:9.2f}" for step, forward in found)
            print(f"{size:5}  {precision:9}  {columns}", flush=True)


def measure(
    network: nn.Module, images: Tensor, precision: Precision, rounds: int, timed: Stopwatch
) -> list[tuple[float, float]]:
    """Seconds of a step and of a forward in each layout."""
    copies = [crafting_copy(network.to(memory_format=each), precision) for each in LAYOUTS.values()]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in copies]
    with machine.convolutions(precision):
        for round_ in range(rounds + 1):  # the first warms up
            for copy, (steps, forwards) in zip(copies, times, strict=True):
                for work, seconds in ((step, steps), (forward, forwards)):
                    spent = timed(work, copy, images)
                    if round_:
                        seconds.append(spent)
    return [(statistics.median(steps), statistics.median(forwards)) for steps, forwards in times]


def step(network: nn.Module, images: Tensor) -> Tensor:
    """Forward and gradient to the input."""
    point = images.detach().requires_grad_()
    return torch.autograd.grad(network(point).logsumexp(1).sum(), point)[0]


@torch.no_grad()
def forward(network: nn.Module, images: Tensor) -> Tensor:
    """The forward that judges an iterate."""
    found: Tensor = network(images)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--batches", type=listed, default=["100"])
    parser.add_argument("--precisions", type=listed, default=["auto"], help="of auto, fp32, tf32, bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    refuse_unknown(parser, "precisions", arguments.precisions, PRECISIONS)
    if odd := [each for each in arguments.batches if not each.isdecimal() or int(each) < 1]:
        parser.error(f"--batches {odd[0]}: must be numbers of images, with commas between them")
    return arguments


if __name__ == "__main__":
    main()
