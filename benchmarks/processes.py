"""Several processes on one machine: images per second of a training step with one and with more, in turn.

Each process takes its slice of the batch on one thread. Beside the rate stands the share of a step that waits
for the gradients of the others: what overlapping them with the backward pass could gain at most.

    python -m benchmarks.processes --network cnn --batch 128 --processes 1,2 --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from dynat.config.params import Machine, load
from dynat.runtime import machine


def main() -> None:
    """Start each number of processes in turn, and print."""
    options = _options()
    if options.worker:
        work(options)
        return
    rates: dict[int, list[tuple[float, float]]] = {count: [] for count in options.processes}
    for _ in range(options.rounds):
        for count in options.processes:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            script = ["-m", "benchmarks.processes", "--worker", "--network", options.network]
            script += ["--batch", str(options.batch), "--steps", str(options.steps)]
            command = [sys.executable, *(torchrun if count > 1 else []), *script]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rate, waiting = map(float, done.stdout.split()[-2:])
            rates[count].append((rate, waiting))
    base = [rate for rate, _ in rates[options.processes[0]]]
    print(
        f"{options.network}, batch {options.batch}, {os.cpu_count()} cores, {options.rounds} rounds in turn"
    )
    for count, found in rates.items():
        ratios = sorted(rate / first for (rate, _), first in zip(found, base, strict=True))
        rate, waiting = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"{count} processes: {rate:8.1f} images/s, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {waiting:.1%} of a step for the others' gradients"
        )


def work(options: argparse.Namespace) -> None:
    """One process: the first prints images per second of the whole batch and the share of waiting."""
    machine.pin(Machine(device="cpu", threads=1))
    import torch

    from benchmarks.train_step import batches, engine_of, networks
    from dynat.methods import step
    from dynat.methods.batches import Batch
    from dynat.runtime import distributed

    device = machine.device_of(Machine(device="cpu", threads=1), "machine")
    distributed.join(device)
    recipe = load().recipes["dynat_inner"]
    target, guide, shape = networks(options.network, recipe, device)
    engine = engine_of(recipe, target, guide, torch.float32)
    own = distributed.part(options.batch)
    (whole,) = batches(recipe, shape, options.batch, 1, device)
    batch = Batch(*(None if each is None else each[own] for each in whole))  # type: ignore[arg-type]
    waited = 0.0

    def average(*arguments: Any) -> None:
        nonlocal waited
        start = time.perf_counter()
        distributed.average(*arguments)
        waited += time.perf_counter() - start

    step.distributed = argparse.Namespace(**{**vars(distributed), "average": average})  # type: ignore[assignment]
    for _ in range(2):
        engine.step(batch)
    waited, start = 0.0, time.perf_counter()
    for _ in range(options.steps):
        engine.step(batch)
    seconds = time.perf_counter() - start
    if distributed.rank() == 0:
        print(options.batch * options.steps / seconds, waited / seconds)
    distributed.leave()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="cnn", help="of benchmarks.train_step")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=lambda text: [*map(int, text.split(","))], default=[1, 2])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
