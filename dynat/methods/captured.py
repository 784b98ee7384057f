"""A training step as a CUDA graph: recorded once, then launched as one, to the bit what it does eagerly.

A step reads nothing from the device and draws nothing, so all that it does is fixed by its batch, the
networks' memory and the constants of its epoch. Launched kernel by kernel it keeps a processor busy for
longer than an H100 needs to compute a ResNet-18's.
"""

import torch

from dynat.methods.batches import Batch
from dynat.methods.step import Constants, Engine, StepLosses

WARM_UP = 3  # eager steps before a recording: kernels are loaded, momenta allocated, the compiler has run


class CapturedSteps:
    """The steps of ``engine``: batches of ``size`` samples by a CUDA graph, any others eagerly.

    The graph is recorded anew when a constant of the step changes, after one eager step with it. Needs a
    CUDA device and one process.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.size = engine, size
        self.eager = WARM_UP  # batches of that size still to come before a recording
        self.constants: Constants | None = None  # of the last batch of that size
        self.recorded: _Recorded | None = None

    def __call__(self, batch: Batch) -> StepLosses:
        """Train on ``batch``, as :meth:`.step.Engine.step`."""
        if len(batch.truth) != self.size:
            return self.engine.step(batch)
        if self.constants != self.engine.constants:
            self.constants, self.recorded = self.engine.constants, None
            self.eager = max(self.eager, 1)  # AWP's first epoch, say, has kernels of its own
        if self.eager:
            self.eager -= 1
            return self.engine.step(batch)
        if self.recorded is None:
            self.recorded = _Recorded(self.engine, batch)
        return self.recorded(batch)


class _Recorded:
    """One recording: of its inputs and outputs each has one place in memory."""

    def __init__(self, engine: Engine, example: Batch) -> None:
        jitter = None if example.jitter is None else example.jitter.clone()
        self.inputs = Batch(example.images.clone(), example.truth.clone(), example.start.clone(), jitter)
        before = [int(counter) for counter in engine.counters]
        engine.optimizer.zero_grad()  # gradients belong to the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = engine.step(self.inputs)
        self.updates = []  # of the counters, which are in host memory: recording has counted, not computed
        for counter, count in zip(engine.counters, before, strict=True):
            self.updates.append((counter, int(counter) - count))
            counter.fill_(count)

    def __call__(self, batch: Batch) -> StepLosses:
        for place, given in zip(self.inputs, batch, strict=True):
            if place is not None and given is not None:
                place.copy_(given)
        self.graph.replay()
        for counter, update in self.updates:
            counter += update
        return StepLosses(*(loss.clone() for loss in self.losses))
