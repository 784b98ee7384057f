"""Networks of the paper and their small relatives: images in [0, 1] to logits.

Parameter names are those of the published CIFAR files, so official checkpoints load with `strict=True`:
`resnet` of kuangliu/pytorch-cifar and LBGAT's resnetcifar.py, `preact_resnet` of locuslab/robust_overfitting
(with the final batch norm), `wrn` of yaodongyu/TRADES. A network is a plain `nn.Sequential` with those names;
global average pooling stands for their fixed 4x4 and 8x8 windows, so any image size works.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from dynat.errors import UserError

Layers = dict[str, nn.Module]


def build(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Return a network mapping (N, in_channels, H, W) floats in [0, 1] to (N, num_classes) logits.

    `name` is a key of NETWORKS, whose functions document their own options. `mean` and `std` (one number
    per channel, together or not at all) normalise the input inside the network; being constants of the
    data they stay out of the state_dict. Raises UserError on an unknown name or an option that cannot be.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network '{name}': choose one of {', '.join(NETWORKS)}")
    mean, std = options.pop("mean", None), options.pop("std", None)
    known = list(inspect.signature(NETWORKS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise UserError(
                f"network '{name}' has no option '{option}': choose from {', '.join(known)}, mean, std"
            )
    stem: Layers = {} if mean is None and std is None else {"normalize": Normalize(mean, std, in_channels)}
    return nn.Sequential(OrderedDict(stem | NETWORKS[name](num_classes, in_channels, **options)))


def resnet(
    num_classes: int,
    in_channels: int,
    blocks: Sequence[int] = (2, 2, 2, 2),
    strides: Sequence[int] = (1, 2, 2, 2),
    width: int = 64,
) -> Layers:
    """ResNet with basic blocks and a 3x3 stem; the defaults are ResNet-18 (He et al., arXiv 1512.03385).

    `blocks` and `strides` give each stage's block count and first stride; channels double per stage from
    `width`. LBGAT's and DYNAT's guide is strides (1, 1, 2, 2). Initialised by PyTorch's defaults.
    """
    stem: Layers = {"conv1": PixelConv(in_channels, width), "bn1": nn.BatchNorm2d(width)}
    stages, channels = _stages(BasicBlock, blocks, strides, width)
    return stem | {"relu": nn.ReLU(inplace=True)} | stages | _head("linear", channels, num_classes)


def preact_resnet(
    num_classes: int,
    in_channels: int,
    blocks: Sequence[int] = (2, 2, 2, 2),
    strides: Sequence[int] = (1, 2, 2, 2),
    width: int = 64,
) -> Layers:
    """Pre-activation ResNet with a final batch norm; the defaults are PreActResNet-18 (Rice et al., 2020).

    Options and initialisation as for `resnet`.
    """
    stem: Layers = {"conv1": PixelConv(in_channels, width)}
    stages, channels = _stages(PreActBlock, blocks, strides, width)
    final: Layers = {"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU(inplace=True)}
    return stem | stages | final | _head("linear", channels, num_classes)


def wrn(
    num_classes: int, in_channels: int, depth: int = 34, widen: int = 10, sub_block1: bool = False
) -> Layers:
    """WideResNet-depth-widen without dropout (Zagoruyko & Komodakis, arXiv 1605.07146), as in TRADES.

    `sub_block1` adds the stage that the files of TRADES, MART, MAIL, LBGAT and DYNAT build and never call:
    their checkpoints need it, and it shifts the random numbers of the initialisation. It is frozen. Modules
    are made in the order of TRADES' file, so one seed gives the same initial weights.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"depth is {depth}: a WideResNet needs 6 n + 4, such as 10, 16, 28 or 34")
    n = (depth - 4) // 6
    c0, c1, c2, c3 = 16, 16 * widen, 32 * widen, 64 * widen
    layers: Layers = {"conv1": PixelConv(in_channels, c0)}
    layers["block1"] = nn.Sequential(OrderedDict(layer=_stage(WideBlock, n, c0, c1, 1)))
    if sub_block1:
        layers["sub_block1"] = Uncalled(_stage(WideBlock, n, c0, c1, 1))
    layers["block2"] = nn.Sequential(OrderedDict(layer=_stage(WideBlock, n, c1, c2, 2)))
    layers["block3"] = nn.Sequential(OrderedDict(layer=_stage(WideBlock, n, c2, c3, 2)))
    layers |= {"bn1": nn.BatchNorm2d(c3), "relu": nn.ReLU(inplace=True)} | _head("fc", c3, num_classes)
    for module in (m for layer in layers.values() for m in layer.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return layers


def cnn(num_classes: int, in_channels: int, width: int = 16, depth: int = 2, stem_stride: int = 1) -> Layers:
    """`depth` layers of 3x3 convolution, batch norm and ReLU, for tests and very small studies.

    The first has `width` channels and stride `stem_stride`; each further one halves the image and doubles
    the channels.
    """
    channels = [in_channels, *(width * 2**i for i in range(depth))]
    layers: Layers = {}
    for i, (c_in, c_out) in enumerate(pairwise(channels), start=1):
        first = i == 1
        layers[f"conv{i}"] = PixelConv(c_in, c_out, stem_stride) if first else _conv(c_in, c_out, 3, stride=2)
        layers[f"bn{i}"] = nn.BatchNorm2d(c_out)
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
    return layers | _head("linear", channels[-1], num_classes)


NETWORKS: dict[str, Callable[..., Layers]] = {
    "resnet": resnet,
    "preact_resnet": preact_resnet,
    "wrn": wrn,
    "cnn": cnn,
}


class PixelConv(nn.Conv2d):
    """The 3x3 convolution that reads the pixels: it computes in float32 under autocast too.

    bfloat16 keeps 8 bits of a pixel, 1/256 of it: more than the random start of a KL attack (0.001) and the
    last steps of any. Its output has the type that autocast asks for, as any convolution's.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__(c_in, c_out, 3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        device = x.device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):  # meta has no autocast
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x).to(torch.get_autocast_dtype(device))


class Normalize(nn.Module):
    """(x - mean) / std per channel; the constants are buffers, so they move with the model, but unsaved."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
        super().__init__()
        for key, values in (("mean", mean), ("std", std)):
            if values is None or len(values) != channels:
                given = "missing" if values is None else f"{list(values)}"
                raise UserError(
                    f"{key} is {given}: give mean and std with {channels} numbers, one per channel"
                )
            self.register_buffer(
                key, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Post-activation residual block: two 3x3 convolutions, batch-normed 1x1 shortcut where shapes differ."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(c_in, c_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv(c_out, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return relu(out, inplace=True)


class PreActBlock(nn.Module):
    """Pre-activation residual block of PreActResNet: a 1x1 shortcut, if any, takes the activated input."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv(c_in, c_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv(c_out, c_out, 3)
        self._add_shortcut(None if stride == 1 and c_in == c_out else _conv(c_in, c_out, 1, stride))

    def _add_shortcut(self, conv: nn.Conv2d | None) -> None:
        self.shortcut = None if conv is None else nn.Sequential(conv)

    def _shortcut(self) -> nn.Module | None:
        return self.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        activated = relu(self.bn1(x), inplace=True)
        projection = self._shortcut()
        skip = x if projection is None else projection(activated)
        out = self.conv2(relu(self.bn2(self.conv1(activated)), inplace=True))
        out += skip
        return out


class WideBlock(PreActBlock):
    """Block of WideResNet: PreActBlock under TRADES' names."""

    def _add_shortcut(self, conv: nn.Conv2d | None) -> None:
        self.convShortcut = conv

    def _shortcut(self) -> nn.Module | None:
        return self.convShortcut


class Uncalled(nn.Module):
    """Blocks that are stored but never run, and frozen: the optimiser and DDP pass over them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x untouched."""
        return x


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def _stage(
    block: Callable[[int, int, int], nn.Module], n: int, c_in: int, c_out: int, stride: int
) -> nn.Sequential:
    return nn.Sequential(block(c_in, c_out, stride), *(block(c_out, c_out, 1) for _ in range(n - 1)))


def _stages(
    block: Callable[[int, int, int], nn.Module], blocks: Sequence[int], strides: Sequence[int], width: int
) -> tuple[Layers, int]:
    """Return layer1, layer2, ... and the channels of the last."""
    if not blocks or len(blocks) != len(strides):
        raise UserError(f"blocks {list(blocks)} and strides {list(strides)}: give one stride per stage")
    widths = [width, *(width * 2**i for i in range(len(blocks)))]
    stages: Layers = {
        f"layer{i + 1}": _stage(block, n, widths[i], widths[i + 1], stride)
        for i, (n, stride) in enumerate(zip(blocks, strides, strict=True))
    }
    return stages, widths[-1]


def _head(name: str, channels: int, num_classes: int) -> Layers:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), name: nn.Linear(channels, num_classes)}
