"""Evidence: an attack's verdict on every sample and an adversarial image of each that it broke."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from dynat.runtime.machine import convolutions


@dataclass(frozen=True)
class Evidence:
    """What an attack on n samples found."""

    robust: Tensor  # bool [n]
    indices: Tensor  # int64 [b], rising: the samples that it broke although they are correct when clean
    images: Tensor  # float32 [b,C,H,W]: a misclassified image in the ball for each of them

    def with_broken(self, indices: Tensor, images: Tensor) -> Self:
        """The same with the further samples ``indices`` [b] broken, by ``images`` [b,C,H,W]."""
        robust = self.robust.clone()
        robust[indices] = False
        indices = torch.cat([self.indices, indices])
        order = indices.argsort()
        return type(self)(robust, indices[order], torch.cat([self.images, images])[order])

    def counted_from(self, first: int) -> Self:
        """The same for samples whose indices begin at ``first``."""
        return type(self)(self.robust, self.indices + first, self.images)


def clean(network: nn.Module, x: Tensor, y: Tensor) -> Evidence:
    """The verdicts on ``x`` float32 [n,C,H,W] without an attack, against the labels ``y`` int64 [n]."""
    nothing = torch.zeros(0, dtype=torch.long, device=x.device)
    return Evidence(predict(network, x) == y, nothing, x[nothing])


def join(parts: Sequence[Evidence], device: torch.device) -> Evidence:
    """The evidence of consecutive samples as one, on ``device``."""
    names = ("robust", "indices", "images")
    return Evidence(*(torch.cat([getattr(part, name).to(device) for part in parts]) for name in names))


@torch.no_grad()
def predict(network: nn.Module, x: Tensor) -> Tensor:
    """Classes int64 [B] that ``network``, in eval mode, predicts in float32 of images float32 [B,C,H,W]."""
    assert not network.training, "evaluation needs eval mode, or verdicts depend on the batch"
    if not len(x):
        return torch.zeros(0, dtype=torch.long, device=x.device)
    with convolutions("fp32"):  # also where images are being crafted in another precision
        return network(x).argmax(1)
