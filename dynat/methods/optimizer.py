"""Stochastic gradient descent as torch.optim.SGD does it, without its import of the compiler.

Building ``torch.optim.SGD`` imports ``torch._dynamo``, seconds of start-up for a training that never
compiles. The update is the same to the bit (a test holds it against torch's).
"""

from typing import Any

import torch
from torch import Tensor, nn


class SGD:
    """v <- momentum v + (g + weight_decay w); w <- w - lr v; parameters without a gradient are left alone."""

    def __init__(
        self, parameters: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self.parameters, self.lr, self.momentum, self.weight_decay = parameters, lr, momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in parameters]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients at hand, in the order of the parameters."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        """One update with the gradients at hand."""
        moving = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not moving:
            return
        weights: list[Tensor] = [self.parameters[index] for index in moving]
        velocities = [self.velocity[index] for index in moving]
        gradients = self.gradients()
        if self.weight_decay:
            gradients = list(torch._foreach_add(gradients, weights, alpha=self.weight_decay))
        torch._foreach_mul_(velocities, self.momentum)
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(weights, velocities, alpha=-self.lr)

    def state_dict(self) -> dict[str, Any]:
        """The velocities, in the order of the parameters."""
        return {"velocity": self.velocity}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, whatever device its tensors are on."""
        for mine, saved in zip(self.velocity, state["velocity"], strict=True):
            mine.copy_(saved)
