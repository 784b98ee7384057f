"""The networks are those of the published files: names, shapes, arithmetic, initial weights and cost."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from benchmarks.train_step import multiply_adds
from dynat.errors import UserError
from dynat.networks.architectures import build

Shapes = dict[str, tuple[int, ...]]

SMALL: dict[str, dict[str, Any]] = {
    "resnet": {"blocks": (1, 1, 1), "strides": (1, 2, 2), "width": 8},
    "preact_resnet": {"blocks": (1, 1, 1), "strides": (1, 2, 2), "width": 8},
    "wrn": {"depth": 10, "widen": 1},
    "cnn": {"width": 8, "depth": 3},
}
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def norm_shapes(name: str, c: int) -> Shapes:
    stats = {f"{name}.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")}
    return stats | {f"{name}.num_batches_tracked": ()}


def resnet18_shapes() -> Shapes:
    """Written out, like its two neighbours, from the published file."""
    shapes = {"conv1.weight": (64, 3, 3, 3)} | norm_shapes("bn1", 64)
    for layer, block, c_in, c in [
        (1, 0, 64, 64), (1, 1, 64, 64), (2, 0, 64, 128), (2, 1, 128, 128),
        (3, 0, 128, 256), (3, 1, 256, 256), (4, 0, 256, 512), (4, 1, 512, 512),
    ]:  # fmt: skip
        at = f"layer{layer}.{block}"
        shapes |= {f"{at}.conv1.weight": (c, c_in, 3, 3)} | norm_shapes(f"{at}.bn1", c)
        shapes |= {f"{at}.conv2.weight": (c, c, 3, 3)} | norm_shapes(f"{at}.bn2", c)
        if c_in != c:
            shapes |= {f"{at}.shortcut.0.weight": (c, c_in, 1, 1)} | norm_shapes(f"{at}.shortcut.1", c)
    return shapes | {"linear.weight": (10, 512), "linear.bias": (10,)}


def preact_resnet18_shapes() -> Shapes:
    shapes: Shapes = {"conv1.weight": (64, 3, 3, 3)}
    for layer, c_in, c in [(1, 64, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512)]:
        for block, first in [(0, c_in), (1, c)]:
            at = f"layer{layer}.{block}"
            shapes |= norm_shapes(f"{at}.bn1", first) | {f"{at}.conv1.weight": (c, first, 3, 3)}
            shapes |= norm_shapes(f"{at}.bn2", c) | {f"{at}.conv2.weight": (c, c, 3, 3)}
            if first != c:
                shapes |= {f"{at}.shortcut.0.weight": (c, first, 1, 1)}
    return shapes | norm_shapes("bn", 512) | {"linear.weight": (10, 512), "linear.bias": (10,)}


def wrn_shapes(blocks: int, widen: int, sub_block1: bool) -> Shapes:
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3)}
    w1, w2, w3 = 16 * widen, 32 * widen, 64 * widen
    stages = [("block1", 16, w1), ("sub_block1", 16, w1), ("block2", w1, w2), ("block3", w2, w3)]
    for stage, c_in, c in stages:
        if stage == "sub_block1" and not sub_block1:
            continue
        for block in range(blocks):
            at, first = f"{stage}.layer.{block}", c if block else c_in
            shapes |= norm_shapes(f"{at}.bn1", first) | {f"{at}.conv1.weight": (c, first, 3, 3)}
            shapes |= norm_shapes(f"{at}.bn2", c) | {f"{at}.conv2.weight": (c, c, 3, 3)}
            if first != c:
                shapes |= {f"{at}.convShortcut.weight": (c, first, 1, 1)}
    return shapes | norm_shapes("bn1", w3) | {"fc.weight": (10, w3), "fc.bias": (10,)}


PUBLISHED: list[Any] = [
    pytest.param("resnet", {}, resnet18_shapes(), id="resnet18"),
    pytest.param("resnet", {"strides": (1, 1, 2, 2)}, resnet18_shapes(), id="lbgat-guide"),
    pytest.param("preact_resnet", {}, preact_resnet18_shapes(), id="preact18"),
    pytest.param("wrn", {}, wrn_shapes(5, 10, False), id="wrn34-10"),
    pytest.param("wrn", {"sub_block1": True}, wrn_shapes(5, 10, True), id="wrn34-10-sub_block1"),
    pytest.param("wrn", {"depth": 28, "widen": 4}, wrn_shapes(4, 4, False), id="wrn28-4"),
]


@pytest.mark.parametrize(("name", "options", "shapes"), PUBLISHED)
def test_state_dict_has_the_published_names_in_order_and_shapes(
    name: str, options: dict[str, Any], shapes: Shapes
) -> None:
    with torch.device("meta"):
        state = build(name, 10, **options).state_dict()
    assert [(k, tuple(v.shape)) for k, v in state.items()] == list(shapes.items())


def test_official_wrn_checkpoints_load_strictly_with_and_without_sub_block1() -> None:
    official = {
        with_sub: {k: torch.full(shape, 2.0) for k, shape in wrn_shapes(1, 2, with_sub).items()}
        for with_sub in (False, True)
    }
    for with_sub in (False, True):
        net = build("wrn", 10, depth=10, widen=2, sub_block1=with_sub)
        net.load_state_dict(official[with_sub], strict=True)
        assert all(torch.equal(v, torch.full_like(v, 2)) for v in net.state_dict().values())
        with pytest.raises(RuntimeError, match="sub_block1"):
            net.load_state_dict(official[not with_sub], strict=True)


def randomised(name: str, **options: Any) -> nn.Module:
    """A network in eval mode whose batch norms and biases all matter."""
    torch.manual_seed(0)
    net = build(name, 10, **options).eval()
    for key, value in net.state_dict().items():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5) if key.endswith(("weight", "var")) else value.normal_(0, 0.5)
    return net


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def conv(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return nnf.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)


def head(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    pooled = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
    return pooled @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def reference_resnet(state: dict[str, Tensor], strides: tuple[int, ...], x: Tensor) -> Tensor:
    """The network written again as functions of its state_dict, for stages of one block."""
    x = norm(state, "bn1", conv(state, "conv1", x)).relu()
    for i, stride in enumerate(strides, start=1):
        at = f"layer{i}.0"
        out = norm(state, f"{at}.bn1", conv(state, f"{at}.conv1", x, stride)).relu()
        out = norm(state, f"{at}.bn2", conv(state, f"{at}.conv2", out))
        if f"{at}.shortcut.0.weight" in state:
            x = norm(state, f"{at}.shortcut.1", conv(state, f"{at}.shortcut.0", x, stride))
        x = (out + x).relu()
    return head(state, "linear", x)


def reference_preact(
    state: dict[str, Tensor], stages: list[tuple[str, int]], names: tuple[str, str, str], x: Tensor
) -> Tensor:
    shortcut, last_norm, linear = names
    x = conv(state, "conv1", x)
    for at, stride in stages:
        active = norm(state, f"{at}.bn1", x).relu()
        out = norm(state, f"{at}.bn2", conv(state, f"{at}.conv1", active, stride)).relu()
        if f"{at}.{shortcut}.weight" in state:
            x = conv(state, f"{at}.{shortcut}", active, stride)
        x = conv(state, f"{at}.conv2", out) + x
    x = norm(state, last_norm, x).relu()
    return head(state, linear, x)


@pytest.mark.parametrize("strides", [(1, 2, 2), (1, 1, 2)])
def test_resnet_computes_the_post_activation_residual_network(strides: tuple[int, ...]) -> None:
    net, x = randomised("resnet", blocks=(1, 1, 1), strides=strides, width=8), torch.rand(3, 3, 16, 16)
    expected = reference_resnet(net.state_dict(), strides, x)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_preact_resnet_feeds_the_activated_input_to_its_shortcuts_and_ends_in_a_batch_norm() -> None:
    net, x = randomised("preact_resnet", **SMALL["preact_resnet"]), torch.rand(3, 3, 16, 16)
    stages = [("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)]
    expected = reference_preact(net.state_dict(), stages, ("shortcut.0", "bn", "linear"), x)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_wrn_feeds_the_activated_input_to_its_shortcuts_and_never_runs_sub_block1() -> None:
    net, x = randomised("wrn", depth=16, widen=2, sub_block1=True), torch.rand(3, 3, 16, 16)
    state = net.state_dict()
    blocks = [("block1", 1), ("block2", 2), ("block3", 2)]
    stages = [(f"{at}.layer.{i}", 1 if i else stride) for at, stride in blocks for i in range(2)]
    expected = reference_preact(state, stages, ("convShortcut", "bn1", "fc"), x)
    for key, value in state.items():
        if key.startswith("sub_block1") and value.is_floating_point():
            value.fill_(math.nan)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_only_sub_block1_is_frozen() -> None:
    net = build("wrn", 10, depth=10, widen=1, sub_block1=True)
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {k for k, _ in net.named_parameters() if k.startswith("sub_block1.")} != set()
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    assert frozen == {k for k, p in net.named_parameters() if p.grad is None}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 32)])
def test_logits_have_one_row_per_image_and_one_column_per_class(name: str, channels: int, size: int) -> None:
    net = build(name, 7, channels, **SMALL[name])
    assert net(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    net, x = randomised(name, **SMALL[name]), torch.rand(4, 3, 16, 16)
    expected = net(x)
    out = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_input_gradient_leaves_the_input_untouched_and_is_finite(name: str) -> None:
    net, x = build(name, 10, **SMALL[name]), torch.rand(4, 3, 16, 16)
    before = x.clone()
    (grad,) = torch.autograd.grad(net(x.requires_grad_()).logsumexp(1).sum(), x)
    assert torch.equal(x, before)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("name", SMALL)
def test_mean_and_std_inside_equal_normalising_outside_and_are_not_saved(name: str) -> None:
    plain = randomised(name, **SMALL[name])
    net = build(name, 10, mean=CIFAR10_MEAN, std=CIFAR10_STD, **SMALL[name]).eval()
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(4, 3, 16, 16)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    assert torch.equal(net(x), plain((x - mean) / std))
    assert not torch.equal(net(x), plain(x))


def test_mean_and_std_follow_the_network_to_another_type() -> None:
    net = build("cnn", 10, mean=CIFAR10_MEAN, std=CIFAR10_STD).double()
    assert {b.dtype for b in net.buffers() if b.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("name", SMALL)
def test_no_pixel_is_rounded_under_bfloat16_autocast(name: str) -> None:
    network, x = build(name, 7, **SMALL[name]).eval(), torch.rand(4, 3, 8, 8)
    seen: list[Tensor] = []
    network.get_submodule("conv1").register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
    weight = network.get_parameter("conv1.weight").detach().double()
    exact = nnf.conv2d(x.double(), weight, padding=1)
    assert seen[0].dtype == torch.bfloat16
    assert (seen[0] - exact).abs().max() <= exact.abs().max() / 256  # its own rounding, no other
    assert torch.equal(seen[0], nnf.conv2d(x, weight.float(), padding=1).bfloat16())


def test_one_seed_gives_the_initial_weights_of_the_trades_file() -> None:
    shapes = [s for k, s in wrn_shapes(1, 2, True).items() if len(s) == 4 and k != "fc.weight"]
    torch.manual_seed(5)
    for c_out, c_in, kernel, _ in shapes:
        nn.Conv2d(c_in, c_out, kernel, bias=False)
    head = nn.Linear(128, 10).weight.detach()
    drawn = [torch.empty(s).normal_(0, math.sqrt(2 / (s[2] * s[3] * s[0]))) for s in shapes]
    torch.manual_seed(5)
    net = build("wrn", 10, depth=10, widen=2, sub_block1=True)
    convolutions = [p for p in net.parameters() if p.dim() == 4]
    assert all(torch.equal(p, expected) for p, expected in zip(convolutions, drawn, strict=True))
    assert torch.equal(net.get_parameter("fc.weight"), head)


def test_wrn_starts_with_zero_biases_and_neutral_batch_norms() -> None:
    state = build("wrn", 10, depth=10, widen=2).state_dict()
    for key, value in state.items():
        if key.endswith(".bias"):
            assert not value.any(), key
        elif value.dim() == 1 and key.endswith(".weight"):
            assert (value == 1).all(), key


def test_resnet_starts_from_pytorchs_uniform_default() -> None:
    weight = build("resnet", 10, blocks=(1,), strides=(1,)).get_parameter("layer1.0.conv1.weight")
    bound = 1 / math.sqrt(64 * 9)
    assert weight.abs().max() <= bound
    assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def wrn_size(n: int, k: int, classes: int) -> int:
    """Parameters by arithmetic: a block has 9 c (c_in + c) weights and 2 (c_in + c) of batch norm."""
    total = 3 * 16 * 9 + 2 * 64 * k + (64 * k + 1) * classes
    for c_in, c in [(16, 16 * k), (16 * k, 32 * k), (32 * k, 64 * k)]:
        total += 9 * c * (c_in + c) + 2 * (c_in + c) + c_in * c + (n - 1) * (18 * c * c + 4 * c)
    return total


def parameters_of(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        wide, unused = build("wrn", 10), build("wrn", 10, sub_block1=True)
        assert parameters_of(build("resnet", 10)) == 11_173_962
        assert parameters_of(build("resnet", 10, strides=(1, 1, 2, 2))) == 11_173_962
        assert parameters_of(build("preact_resnet", 10)) == 11_172_170
    assert parameters_of(wide) == wrn_size(5, 10, 10) == 46_160_474
    sub_block1 = 9 * 160 * (16 + 160) + 2 * (16 + 160) + 16 * 160 + 4 * (18 * 160 * 160 + 4 * 160)
    assert parameters_of(unused) - parameters_of(wide) == sub_block1 == 2_102_112


def resnet18_macs(sides: tuple[int, ...]) -> int:
    total, c_in = 3 * 64 * 9 * 32**2 + 512 * 10, 64
    for c, side in zip((64, 128, 256, 512), sides, strict=True):
        total += side**2 * (9 * (c_in * c + 3 * c * c) + (c_in * c if c_in != c else 0))
        c_in = c
    return total


def wrn34_10_macs() -> int:
    total = 3 * 16 * 9 * 32**2 + 640 * 10
    for c_in, c, side in [(16, 160, 32), (160, 320, 16), (320, 640, 8)]:
        total += side**2 * (9 * (c_in * c + 9 * c * c) + c_in * c)
    return total


@pytest.mark.parametrize(
    ("name", "options", "exact", "giga"),
    [
        ("resnet", {}, resnet18_macs((32, 16, 8, 4)), 0.556),
        ("resnet", {"strides": (1, 1, 2, 2)}, resnet18_macs((32, 32, 16, 8)), 1.763),
        ("preact_resnet", {}, resnet18_macs((32, 16, 8, 4)), 0.556),
        ("wrn", {}, wrn34_10_macs(), 6.66),
        ("wrn", {"sub_block1": True}, wrn34_10_macs(), 6.66),
    ],
)
def test_multiply_adds_equal_the_layer_table(
    name: str, options: dict[str, Any], exact: int, giga: float
) -> None:
    with torch.device("meta"):
        network = build(name, 10, **options)
    assert multiply_adds(network, (3, 32, 32)) == exact
    assert exact / 1e9 == pytest.approx(giga, rel=2e-3)


def test_counting_multiply_adds_leaves_the_network_as_it_was() -> None:
    net = build("resnet", 10, 1, **SMALL["resnet"])
    net.get_submodule("bn1").eval()
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert multiply_adds(net, (1, 8, 8)) > 0
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, r"unknown network 'resnet18': choose one of resnet, preact_resnet, wrn, cnn"),
        ("resnet", {"widht": 8}, r"'resnet' has no option 'widht': choose from blocks, strides, width"),
        ("wrn", {"blocks": [1]}, r"'wrn' has no option 'blocks': choose from depth, widen, sub_block1"),
        ("resnet", {"blocks": [1, 1, 1]}, r"blocks \[1, 1, 1\] and strides \[1, 2, 2, 2\]: give one stride"),
        ("preact_resnet", {"blocks": [], "strides": []}, r"blocks \[\] and strides \[\]: give one stride"),
        ("wrn", {"depth": 32}, r"depth is 32: a WideResNet needs 6 n \+ 4"),
        ("wrn", {"depth": 4}, r"depth is 4: a WideResNet needs 6 n \+ 4"),
        ("cnn", {"mean": [0.5, 0.5, 0.5]}, r"std is missing: give mean and std with 3 numbers"),
        ("cnn", {"mean": [0.5], "std": [0.5]}, r"mean is \[0.5\]: give mean and std with 3 numbers"),
    ],
)
def test_impossible_network_is_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        build(name, 10, **options)
    assert "\n" not in str(refusal.value)
