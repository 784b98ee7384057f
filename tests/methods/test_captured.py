"""When a step is recorded and what is replayed, by a stand-in for CUDA's graphs that notes what it is asked.

That a graph gives the bits of eager steps is shown on a device, by ``tests/test_cuda.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dynat.methods.batches import Batch
from dynat.methods.captured import WARM_UP, CapturedSteps
from dynat.methods.step import StepLosses

SIZE = 4


class Stub:
    """An engine whose losses are sums of the batch and that counts its updates."""

    def __init__(self) -> None:
        self.eager = 0
        self.counters = [torch.tensor(7), torch.tensor(9)]
        self.constants = "first"
        self.optimizer = SimpleNamespace(zero_grad=lambda: None)

    def step(self, batch: Batch) -> StepLosses:
        self.eager += 1
        self.counters[0] += 2  # and the other network is not forwarded
        return losses(batch)


def losses(batch: Batch) -> StepLosses:
    jitter = torch.zeros(()) if batch.jitter is None else batch.jitter.sum()
    return StepLosses(batch.images.sum() + batch.start.sum(), jitter, batch.truth.sum())


class Graph:
    """Recorded is a function of the memory of inputs and outputs, which a replay computes again."""

    def __init__(self) -> None:
        self.replays = 0
        GRAPHS.append(self)

    def replay(self) -> None:
        self.replays += 1
        for place, value in zip(self.outputs, losses(self.inputs), strict=True):
            place.copy_(value)

    inputs: Batch
    outputs: StepLosses


GRAPHS: list[Graph] = []


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> tuple[Stub, CapturedSteps]:
    """An engine and its captured steps."""
    GRAPHS.clear()
    engine: Any = Stub()

    @contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        def step(batch: Batch) -> StepLosses:
            graph.inputs, graph.outputs = batch, Stub.step(engine, batch)
            engine.eager -= 1
            return graph.outputs

        with monkeypatch.context() as patched:
            patched.setattr(engine, "step", step)
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return engine, CapturedSteps(engine, SIZE)


def batch_of(size: int, value: float) -> Batch:
    images: Tensor = torch.full((size, 1, 2, 2), value)
    return Batch(images, torch.full((size,), int(value)), images / 2, images[None] / 4)


def test_full_batches_are_recorded_after_the_warm_up_and_others_never(
    steps: tuple[Stub, CapturedSteps],
) -> None:
    engine, step = steps
    for value in range(WARM_UP):
        step(batch_of(SIZE, value))
        step(batch_of(SIZE - 1, value))
    assert (engine.eager, len(GRAPHS)) == (2 * WARM_UP, 0)
    for value in range(5):
        step(batch_of(SIZE, value))
    step(batch_of(SIZE - 1, 1))
    assert (engine.eager, len(GRAPHS), GRAPHS[0].replays) == (2 * WARM_UP + 1, 1, 5)


def test_a_replay_reads_its_own_batch_and_its_losses_outlive_the_next_one(
    steps: tuple[Stub, CapturedSteps],
) -> None:
    _, step = steps
    batches = [batch_of(SIZE, value) for value in range(WARM_UP + 4)]
    found = [step(batch) for batch in batches]
    for batch, each in zip(batches, found, strict=True):
        assert [float(value) for value in each] == [float(value) for value in losses(batch)]


def test_a_step_counts_once_whether_recorded_or_not(steps: tuple[Stub, CapturedSteps]) -> None:
    engine, step = steps
    for done in range(1, WARM_UP + 4):
        step(batch_of(SIZE, done))
        assert [int(counter) for counter in engine.counters] == [7 + 2 * done, 9]


def test_other_constants_are_recorded_anew_after_an_eager_step_and_equal_ones_are_not(
    steps: tuple[Stub, CapturedSteps],
) -> None:
    engine, step = steps
    for changes, constants in enumerate(("first", "second", "first")):
        engine.constants = constants
        for value in range(WARM_UP + 1):
            step(batch_of(SIZE, value))
            step(batch_of(SIZE - 1, value))
        assert len(GRAPHS) == 1 + changes
        others = (WARM_UP + 1) * (1 + changes)
        assert engine.eager == others + WARM_UP + changes
        engine.constants = "".join([*constants])  # equal, and another object
        step(batch_of(SIZE, 1))
        assert len(GRAPHS) == 1 + changes
