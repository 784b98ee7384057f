"""What adversarial images are crafted with: the frozen network with batch norm folded in, or its bf16 twin.

Both compute what the network computes up to rounding, so they craft but never judge: every success is
verified by the network itself.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from dynat.networks.architectures import BasicBlock, PixelConv, PreActBlock, WideBlock

Place = tuple[nn.Module, str]  # a module and the name of its child


def fold(network: nn.Module) -> nn.Module:
    """A frozen copy of ``network`` without the batch norms that directly follow a convolution.

    Equal to the network up to rounding: the weights are folded in float64 and kept in their own dtype. A
    batch norm after a sum stays (the first of a pre-activation block, the last of such a network), and so
    does the normalisation of the input, whose zero padding it would move. The network must be in eval mode.
    """
    assert not network.training, "folding needs eval mode: batch norm by its running statistics"
    network = copy.deepcopy(network).requires_grad_(False)
    for (owner, conv), (norm_owner, norm) in list(_pairs(network)):
        setattr(owner, conv, _folded(getattr(owner, conv), getattr(norm_owner, norm)))
        setattr(norm_owner, norm, nn.Identity())
    return network


def _pairs(network: nn.Module) -> Iterator[tuple[Place, Place]]:
    """Where a convolution's output goes to a batch norm and nowhere else."""
    for module in network.modules():
        if isinstance(module, BasicBlock):
            yield (module, "conv1"), (module, "bn1")
            yield (module, "conv2"), (module, "bn2")
        elif isinstance(module, (PreActBlock, WideBlock)):
            yield (module, "conv1"), (module, "bn2")
        elif isinstance(module, nn.Sequential):
            for (first, conv), (second, norm) in pairwise(module.named_children()):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    yield (module, first), (module, second)


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution for ``norm(conv(x))`` with the norm's running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        shift += conv.bias.double() * scale
    weight = conv.weight
    conv.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).to(weight), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(weight), requires_grad=False)
    return conv


def mixed(network: nn.Module) -> nn.Module:
    """The folded network with convolutions and linear layers in bfloat16; logits are float32.

    The convolution that reads the pixels computes in float32 (``networks.PixelConv``).
    """
    network = fold(network)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not isinstance(layer, PixelConv):
            layer.to(torch.bfloat16)
    return _Autocast(network).eval()


class _Autocast(nn.Module):
    """Runs a network under bfloat16 autocast: its weights are in bfloat16 already, activations follow."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.network(x)
        return logits.float()
