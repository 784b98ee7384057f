"""The folded copy that is attacked equals the network in eval mode: up to rounding, or up to bf16."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynat.networks.architectures import build
from dynat.networks.folded import Folded, fold, mixed

FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # options, and the batch norms that follow no convolution
    "cnn": ({"width": 4}, 0),
    "resnet": ({"blocks": [1, 2], "strides": [1, 2], "width": 4, "mean": [0.5] * 3, "std": [0.2] * 3}, 0),
    "preact_resnet": ({"blocks": [1, 2], "strides": [1, 2], "width": 4}, 3 + 1),
    "wrn": ({"depth": 10, "widen": 1, "sub_block1": True}, 3 + 1 + 1),
}
IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(name: str) -> nn.Module:
    """A float32 network in eval mode whose batch norms are anything but the identity."""
    torch.manual_seed(0)
    network = build(name, 5, **FAMILIES[name][0])
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + (0.1 if "var" in key else -0.3))
    return network.eval()


def values(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of a fixed function of them with respect to the input."""
    point = x.clone().requires_grad_()
    logits = function(point)
    (gradient,) = torch.autograd.grad(logits.square().sum(), point)
    return logits.detach(), gradient


def distance(mine: Tensor, other: Tensor) -> float:
    """Relative distance of an ordinary sample: where rounding turns a ReLU, a gradient is far off."""
    apart, size = (mine - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    return (apart / size).median().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_input_gradients_are_the_networks_own_also_after_a_refresh(name: str) -> None:
    network, x = trained(name).double(), IMAGES[:3].double()
    folded = fold(network)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left == FAMILIES[name][1]
    for _ in range(2):
        for mine, own in zip(values(folded, x), values(network, x), strict=True):
            assert torch.allclose(mine, own, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for value in network.state_dict().values():
                value.mul_(2)
        assert not torch.allclose(folded(x), network(x))
        folded.refresh(network)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_refreshed_copy_is_to_the_bit_a_new_one_at_its_own_addresses(
    name: str, precision: torch.dtype
) -> None:
    network = trained(name)
    folded = Folded(network, precision)
    addresses = [tensor.data_ptr() for tensor in folded.state_dict().values()]
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(1)
    folded.refresh(network)
    new = Folded(network, precision).state_dict()
    assert all(torch.equal(value, new[key]) for key, value in folded.state_dict().items())
    assert addresses == [tensor.data_ptr() for tensor in folded.state_dict().values()]


def test_weights_are_folded_in_float64() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[1].running_var.fill_(1e-4)
    network[1].weight.data.fill_(1 / 3)
    exact = fold(copy.deepcopy(network).double()).state_dict()
    for key, value in fold(network).state_dict().items():
        assert torch.equal(value, exact[key].float())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_itself_stays_as_it_was_and_shares_no_memory(name: str) -> None:
    network = trained(name)
    before = copy.deepcopy(network.state_dict())
    own = {value.data_ptr() for value in network.state_dict().values()}
    for copied in (fold(network), mixed(network)):
        copied.refresh(network)
        copied(IMAGES[:2])
        assert not any(parameter.requires_grad for parameter in copied.parameters())
        assert not own & {value.data_ptr() for value in copied.state_dict().values()}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert any(parameter.requires_grad for parameter in network.parameters())


def test_training_mode_is_refused() -> None:
    with pytest.raises(AssertionError, match="eval mode"):
        fold(trained("cnn").train())


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_computes_in_bf16_answers_in_float32_and_is_as_exact_as_autocast(name: str) -> None:
    network = trained(name)
    copied, outputs, weights = mixed(network), [], []
    for layer in copied.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(lambda _, inputs, output: outputs.append(output.dtype))
            weights.append(layer.weight.dtype)
    assert copied(IMAGES[:2]).dtype == torch.float32
    assert set(outputs) == {torch.bfloat16}
    assert weights[0] == torch.float32  # the layer that reads the pixels
    assert set(weights[1:]) == {torch.bfloat16}

    def autocast(point: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(point).float()

    exact = values(copy.deepcopy(network).double(), IMAGES.double())
    for mine, own, truth in zip(values(copied, IMAGES), values(autocast, IMAGES), exact, strict=True):
        assert 0 < distance(mine, truth) < 2 * distance(own, truth)
        assert distance(mine, truth) < 0.03
        if truth.ndim == 2:  # logits, which no turned ReLU moves far: all samples together too
            error, reference = (mine - truth).norm(), (own - truth).norm()
            assert error < 5 * reference
            assert error < 0.1 * truth.norm()


class Standardised(nn.Conv2d):
    """A convolution that does more than its class says: its weights are standardised as they are used."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return torch.nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)]
)
@pytest.mark.parametrize("convolution", [Standardised(3, 4, 3), nn.Conv2d(3, 4, 3)])
def test_somebodys_own_layers_are_not_folded_into_something_else(
    convolution: nn.Module, norm: nn.BatchNorm2d
) -> None:
    network = (
        nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    )
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(fold(network)(x), network(x), rtol=0, atol=1e-12)
