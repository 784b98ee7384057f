"""What adversarial images are crafted with: a frozen copy of a network, its batch norms folded away.

In eval mode a batch norm is an affine map, so one that directly follows a convolution becomes part of its
weights. The copy computes what the network computes up to rounding: it crafts and never judges, for an
evaluation verifies every success with the network itself.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from dynat.config.recipe import Precision
from dynat.networks.architectures import BasicBlock, PixelConv, PreActBlock


def fold(network: nn.Module) -> "Folded":
    """The folded copy of ``network``, which must be in eval mode, in the network's own type."""
    return Folded(network)


def mixed(network: nn.Module) -> "Folded":
    """The folded copy of ``network``, which must be in eval mode, computing in bfloat16."""
    return Folded(network, torch.bfloat16)


def crafting_copy(network: nn.Module, precision: Precision) -> "Folded":
    """The folded copy of ``network``, which must be in eval mode, for crafting in ``precision``.

    TF32 is a switch of the process, the caller's: :func:`dynat.runtime.machine.convolutions`.
    """
    return mixed(network) if precision == "bf16" else fold(network)


class Folded(nn.Module):
    """The function of ``network`` in eval mode as of the last :meth:`refresh`, without parameter gradients.

    Weights are folded in float64. With ``precision`` float32 they keep the network's own type; otherwise
    convolutions and linear layers hold and compute in ``precision``, but for the convolution that reads the
    pixels (:class:`dynat.networks.architectures.PixelConv`). A batch norm after a sum stays (the first of a
    pre-activation block, the last of such a network), and so does the normalisation of the input, whose zero
    padding it would move.
    """

    def __init__(self, network: nn.Module, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert not network.training, "folding needs eval mode: batch norm by its running statistics"
        self.precision = precision
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.pairs = list(_pairs(network))
        for convolution, norm in self.pairs:
            layer = self.network.get_submodule(convolution)
            bias = layer.get_parameter("weight").new_empty(len(layer.get_parameter("weight")))
            layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
            self.network.set_submodule(norm, nn.Identity())
        for layer in self.network.modules():
            matrix = isinstance(layer, (nn.Conv2d, nn.Linear)) and not isinstance(layer, PixelConv)
            if matrix and precision != torch.float32:
                layer.to(precision)
        self.refresh(network)
        self.eval()

    @torch.no_grad()
    def refresh(self, network: nn.Module) -> None:
        """Take over the present weights and running statistics of ``network``, in place."""
        present = _tensors(network)
        for convolution, norm in self.pairs:
            weight, bias = _folded(network.get_submodule(convolution), network.get_submodule(norm))
            present |= {f"{convolution}.weight": weight, f"{convolution}.bias": bias}
        for name, tensor in _tensors(self.network).items():
            tensor.copy_(present[name])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W], in float32 or wider."""
        if self.precision == torch.float32:
            return self.network(x)
        with torch.autocast(x.device.type, self.precision):
            return self.network(x).float()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; ``state_dict`` would break the compiler's graph of a step."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of each convolution whose output goes to a batch norm and nowhere else, and of that norm."""
    for name, module in network.named_modules():
        found: list[tuple[str, str]] = []
        if isinstance(module, BasicBlock):
            found = [("conv1", "bn1"), ("conv2", "bn2")]
        elif isinstance(module, PreActBlock):
            found = [("conv1", "bn2")]
        elif type(module).forward is nn.Sequential.forward:
            for (first, convolution), (second, norm) in pairwise(module.named_children()):
                if _foldable(convolution, norm):
                    found.append((first, second))
        prefix = f"{name}." if name else ""
        yield from ((prefix + convolution, prefix + norm) for convolution, norm in found)


def _foldable(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether both compute just what these classes do, which a subclass or a hook of somebody's may not."""
    exact = type(convolution) in (nn.Conv2d, PixelConv) and type(norm) is nn.BatchNorm2d
    hooks = [hook for each in (convolution, norm) for hook in (each._forward_pre_hooks, each._forward_hooks)]
    return exact and not any(hooks) and norm.weight is not None and norm.running_mean is not None


def _folded(convolution: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution for ``norm(convolution(x))`` with the norm's running statistics."""
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if convolution.bias is not None:
        shift += convolution.bias.double() * scale
    weight = convolution.weight
    return (weight.double() * scale[:, None, None, None]).to(weight), shift.to(weight)
