"""A network as the inner loop sees it: eval mode and constant weights, so it can be simplified once a step.

Batch norm in eval mode is an affine map; where it directly follows a convolution of the same block it is
folded into its weights. Weights are held in the compute precision, so that no forward casts them; those
that read the pixels stay in float32 (``networks.PixelConv``).
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynat.networks.architectures import PixelConv


class Pair(NamedTuple):
    """A convolution and the batch norm behind it, by name."""

    convolution: str
    norm: str


class Frozen:
    """The eval-mode function of ``network``, as of the last :meth:`refresh`, without parameter gradients.

    ``example`` [B,C,H,W] is forwarded once to see which batch norms follow a convolution directly. With
    ``dtype`` other than float32 call it under autocast to that type. ``network`` must be in eval mode when
    this is built. Outputs differ from the network's by rounding.
    """

    def __init__(self, network: nn.Module, example: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.network = network
        self.copy = copy.deepcopy(network).requires_grad_(False).eval()
        self.pairs = _pairs(self.copy, example)
        self.convolutions: dict[str, nn.Conv2d] = {}  # of the copy, with a norm folded in
        for pair in self.pairs:
            convolution = self.copy.get_submodule(pair.convolution)
            assert isinstance(convolution, nn.Conv2d)
            if convolution.bias is None:
                bias = convolution.weight.new_zeros(convolution.out_channels)
                convolution.bias = nn.Parameter(bias, requires_grad=False)
            self.convolutions[pair.convolution] = convolution
            _replace(self.copy, pair.norm, nn.Identity())
        folded = tuple(f"{pair.convolution}." for pair in self.pairs)
        tensors = [*self.copy.named_parameters(), *self.copy.named_buffers()]
        self.plain = [(name, tensor) for name, tensor in tensors if not name.startswith(folded)]
        reversible = dtype == torch.bfloat16 and example.device.type == "cpu"
        self.reversed: list[_Reversible] = []
        for name, module in list(self.copy.named_modules()):
            if isinstance(module, PixelConv):
                continue
            if isinstance(module, (nn.Conv2d, nn.Linear)) and dtype != torch.float32:
                module.to(dtype)
            if reversible and isinstance(module, nn.Conv2d) and _keeps_size(module):
                self.reversed.append(_Reversible(module))
                _replace(self.copy, name, self.reversed[-1])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the network's present weights and running statistics."""
        original = dict([*self.network.named_parameters(), *self.network.named_buffers()])
        for name, tensor in self.plain:
            tensor.copy_(original[name])
        for pair in self.pairs:
            norm, convolution = self.network.get_submodule(pair.norm), self.convolutions[pair.convolution]
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert convolution.bias is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
            if f"{pair.convolution}.bias" in original:
                shift += original[f"{pair.convolution}.bias"] * scale
            convolution.weight.copy_(original[f"{pair.convolution}.weight"] * scale[:, None, None, None])
            convolution.bias.copy_(shift)
        for each in self.reversed:
            each.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W]."""
        logits: Tensor = self.copy(x)
        return logits


def _pairs(network: nn.Module, example: Tensor) -> list[Pair]:
    """Each convolution whose output a batch norm of the same block reads, unchanged in between.

    Of the same block: the stem of a pre-activation network has a second reader, the first block's sum.
    """
    made: dict[int, tuple[str, Tensor, int]] = {}  # the tensor is kept, so that its id stays its own
    pairs = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = name, output, output._version
            return
        source, _, version = made.get(id(inputs[0]), ("", None, -1))
        if inputs[0]._version == version and _parent(source) == _parent(name):
            pairs.append(Pair(source, name))

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, _BatchNorm))]
    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in layers]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    return pairs


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    setattr(network.get_submodule(_parent(name)), name.rpartition(".")[2], module)


def _keeps_size(convolution: nn.Conv2d) -> bool:
    """Whether its gradient to the input is a convolution with the flipped kernel and the same padding."""
    kernel = convolution.kernel_size[0]
    return (
        set(convolution.kernel_size) == {kernel}
        and set(convolution.padding) == {(kernel - 1) / 2}
        and set(convolution.stride) == set(convolution.dilation) == {1}
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )


class _Reversible(nn.Module):
    """A convolution whose gradient to the input is computed as a forward convolution.

    oneDNN's bfloat16 forward runs at 2.6 TFLOP/s where its backward runs at 0.75 (two AMX cores).
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        flipped = convolution.weight.detach().transpose(0, 1)
        self.backward_weight = flipped.clone(memory_format=torch.channels_last)

    def refresh(self) -> None:
        """Flip the convolution's present kernel."""
        self.backward_weight.copy_(self.convolution.weight.flip(2, 3).transpose(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,C,H,W] to [B,C',H,W]."""
        weight, bias = self.convolution.weight, self.convolution.bias
        return _Convolve.apply(x.to(weight.dtype), weight, bias, self.backward_weight)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backward_weight: Tensor,
    ) -> Tensor:
        context.save_for_backward(backward_weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = context.saved_tensors
        return F.conv2d(gradient, weight, padding=weight.shape[2] // 2), None, None, None
