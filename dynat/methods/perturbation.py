"""Adversarial weight perturbation: choice 5 of a recipe (Wu et al. 2020, csdongxian/AWP).

The published code ascends a proxy copy by one SGD step and rescales the difference per tensor to
gamma * ||w||; only the direction of the gradient survives that, so the proxy and its rate are not needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynat.runtime import distributed


def perturbable(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that AWP moves: trained, more than one dimension and "weight" in the name."""
    named = network.named_parameters()
    return [p for name, p in named if p.requires_grad and p.ndim > 1 and "weight" in name]


def direction(loss: Tensor, parameters: list[nn.Parameter], gamma: float, count: int = 1) -> list[Tensor]:
    """Per tensor gamma * ||w|| * g / ||g||: where ``loss`` grows fastest, at a fixed relative length.

    Of several processes' losses, each the mean over ``count`` samples, the mean over all samples counts.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    distributed.average([gradient for gradient in gradients if gradient is not None], count)
    return [
        torch.zeros_like(p) if g is None else g * (gamma * p.detach().norm() / (g.norm() + 1e-20))
        for p, g in zip(parameters, gradients, strict=True)
    ]


@contextmanager
def perturbed(parameters: list[nn.Parameter], offsets: list[Tensor]) -> Iterator[None]:
    """Run the body at w + v, then keep only what the body itself changed: w + (after - (w + v)).

    Without an optimiser step inside, the weights come back to the bit. With one it acts at w + v, weight
    decay included, as published.
    """
    with torch.no_grad():
        originals = [p.clone() for p in parameters]
        for parameter, offset in zip(parameters, offsets, strict=True):
            parameter.add_(offset)
        moved = [p.clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, original, start in zip(parameters, originals, moved, strict=True):
                parameter.copy_(original + (parameter - start))
