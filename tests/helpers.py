"""What several tests share: a tiny float64 network and published steps written out plainly."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class Tiny(nn.Module):
    """Two batch-normed convolutions and a linear layer, with a `sub_block1` that is never called.

    Float64 and smooth, so that the sign of a gradient does not hang on rounding.
    """

    def __init__(self, seed: int, classes: int = 3, channels: int = 2, width: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(width)
            self.sub_block1 = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))
            self.conv2 = nn.Conv2d(width, width, 3, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.fc = nn.Linear(width, classes)
        self.double()
        with torch.no_grad():
            self.fc.weight.mul_(25)  # sharp enough that small perturbations change predictions

    def forward(self, x: Tensor) -> Tensor:
        x = silu(self.bn1(self.conv1(x)))
        x = silu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def random_images(seed: int, count: int = 6, channels: int = 2, size: int = 4) -> Tensor:
    """Images float64 [count,channels,size,size] in [0,1], some pixels exactly at the bounds."""
    noise = torch.rand(count, channels, size, size, generator=stream(seed), dtype=torch.float64)
    return (1.4 * noise - 0.2).clamp(0, 1)


def random_labels(seed: int, count: int = 6, classes: int = 3) -> Tensor:
    return torch.randint(classes, (count,), generator=stream(seed))


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy per sample."""
    return torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)])


def kl(natural: Tensor, adversarial: Tensor) -> Tensor:
    """KL(p_nat || p_adv) per sample."""
    p, q = natural.softmax(1), adversarial.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def proxy_perturbation(
    network: nn.Module, loss: Callable[[nn.Module], Tensor], gamma: float
) -> dict[str, Tensor]:
    """v as csdongxian/AWP finds it: copy, one SGD step uphill, difference, rescaled per tensor."""
    proxy = copy.deepcopy(network).train()
    proxy.zero_grad()
    loss(proxy).backward()
    v = {}
    for (name, old), new in zip(network.named_parameters(), proxy.parameters(), strict=True):
        if new.grad is not None:
            new.data += 0.01 * new.grad
        if old.ndim > 1 and "weight" in name:
            diff = (new - old).detach()
            v[name] = gamma * old.detach().norm() / (diff.norm() + 1e-20) * diff
    return v


def add_to_weights(network: nn.Module, v: dict[str, Tensor], sign: int) -> None:
    """w <- w + sign v."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in v:
                parameter += sign * v[name]
