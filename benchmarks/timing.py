"""What the benchmarks share: a stopwatch for a CPU or a GPU, and options that are lists."""

import argparse
import time
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType

PRECISIONS = ("auto", "fp32", "tf32", "bf16")


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
        return self.both(step, *arguments)[1]

    def both(self, step: Callable[..., object], *arguments: object, count: int = 1) -> tuple[float, float]:
        """Seconds of a ``step(*arguments)``: until it was handed over, until it was done; of ``count``."""
        self._synchronise()
        start = self.clock()
        for _ in range(count):
            step(*arguments)
        host = self.clock() - start
        self._synchronise()
        return host / count, (self.clock() - start) / count

    def kernels(self, step: Callable[..., object], *arguments: object) -> float:
        """Seconds that the device computes in ``step(*arguments)``, gaps left out; CPU: 0."""
        if self.device.type != "cuda":
            return 0.0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            step(*arguments)
            self._synchronise()
        kernels = [each for each in found.key_averages() if each.device_type == DeviceType.CUDA]
        return sum(each.self_device_time_total for each in kernels) / 1e6

    def memory(self, peak: bool = False) -> int:
        """Bytes of the device's memory in use, or their ``peak`` since the last call without it; CPU: 0."""
        if self.device.type != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def listed(text: str) -> list[str]:
    """The entries of a list with commas."""
    return text.split(",")


def refuse_unknown(
    parser: argparse.ArgumentParser, name: str, given: Iterable[str], known: Iterable[str]
) -> None:
    """End with a usage error if an entry of the option ``name`` is none of ``known``."""
    if unknown := set(given).difference(known):
        parser.error(f"--{name} {', '.join(sorted(unknown))}: choose of {', '.join(known)}")
