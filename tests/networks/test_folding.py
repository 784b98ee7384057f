"""The networks that craft adversarial images equal the stored one: up to rounding, or up to bf16."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynat.networks.architectures import build
from dynat.networks.folding import fold, mixed

FAMILIES: list[tuple[dict[str, Any], int]] = [  # network, and the batch norms that follow no convolution
    ({"name": "cnn", "width": 8, "depth": 2}, 0),
    ({"name": "resnet", "width": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}, 0),
    ({"name": "preact_resnet", "width": 8}, 8 + 1),
    ({"name": "wrn", "depth": 10, "widen": 1, "sub_block1": True}, 3 + 1 + 1),
]
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(options: dict[str, Any]) -> nn.Module:
    """In eval mode, with batch-norm statistics and weights that are not those of a new network."""
    torch.manual_seed(0)
    network = build(num_classes=5, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def gradient(network: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(network(images)[:, 0].sum(), images)[0]


@pytest.mark.parametrize(("options", "left"), FAMILIES)
def test_folded_network_has_the_same_logits_and_gradients(options: dict[str, Any], left: int) -> None:
    network = trained(options).double()
    folded, images = fold(network), IMAGES.double()
    assert torch.allclose(folded(images), network(images), rtol=1e-10, atol=1e-10)
    assert torch.allclose(gradient(folded, images), gradient(network, images), rtol=1e-8, atol=1e-10)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left


def test_weights_are_folded_in_float64() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[1].running_var.fill_(1e-4)
    network[1].weight.data.fill_(1 / 3)
    (conv, _), exact = fold(network), fold(copy.deepcopy(network).double())[0]
    assert torch.equal(conv.weight, exact.weight.float())


def test_the_network_itself_stays_as_it_was() -> None:
    network = trained(FAMILIES[2][0])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for twin in (fold(network), mixed(network)):
        assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_training_mode_is_refused() -> None:
    with pytest.raises(AssertionError, match="eval mode"):
        fold(trained(FAMILIES[0][0]).train())


@pytest.mark.parametrize(("options", "left"), FAMILIES)
def test_mixed_network_computes_in_bf16_and_answers_in_float32(options: dict[str, Any], left: int) -> None:
    network = trained(options)
    twin, seen, weights = mixed(network), [], []
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
            weights.append(module.weight.dtype)
    logits, expected = twin(IMAGES), network(IMAGES)
    assert logits.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert weights[0] == torch.float32  # the layer that reads the pixels
    assert set(weights[1:]) == {torch.bfloat16}
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
