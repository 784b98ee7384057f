"""Batch-norm running statistics as the published code leaves them, without its redundant forwards.

A train-mode forward moves a running statistic r to (1 - m) r + m b. Published training steps forward the
same batch several times under the same weights; since b is the same each time, any order and number of
such forwards is reached by one forward per distinct batch with other momenta (docs/methods.md, sections
3.1 and 13).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def effective_momenta(sequence: Sequence[str], order: Sequence[str], momentum: float = 0.1) -> list[float]:
    """Momenta in [0,1] for one forward per name of ``order`` that leave r as all of ``sequence`` would.

    ``sequence`` names the published forwards, first to last; ``order`` the distinct batches in the order
    in which they are really forwarded.
    """
    share = dict.fromkeys(order, 0.0)  # weight of each batch's statistic in the result
    for age, name in enumerate(reversed(sequence)):
        share[name] += momentum * (1 - momentum) ** age
    momenta = []
    later = 1.0  # product of (1 - m) over the forwards that come after
    for name in reversed(order):
        momenta.append(share[name] / later if share[name] else 0.0)
        later *= 1 - momenta[-1]
    return momenta[::-1]


def count_on_host(network: nn.Module) -> list[torch.Tensor]:
    """Keep how often each batch norm of ``network`` was updated in host memory, and return these counters.

    On a GPU each of them would be a kernel of its own, hundreds in a step.
    """
    counters = []
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
            if layer.num_batches_tracked.is_cuda:
                layer.num_batches_tracked = layer.num_batches_tracked.cpu()
            counters.append(layer.num_batches_tracked)
    return counters


@contextmanager
def statistics(network: nn.Module, momentum: float, updates: int) -> Iterator[None]:
    """Forwards inside move running statistics with ``momentum`` and count as ``updates`` forwards."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    tracked = [(m, m.momentum, m.num_batches_tracked) for m in layers if m.num_batches_tracked is not None]
    before = [(layer, own, counter, counter.clone()) for layer, own, counter in tracked]
    for layer, *_ in before:
        layer.momentum = momentum
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, own, counter, count in before:
                layer.momentum = own
                counter.copy_(count + updates * (counter > count))  # a layer never called counts nothing
