"""AWP moves each weight tensor as the published proxy does and leaves nothing behind."""

import copy

import pytest
import torch
from helpers import Tiny, add_to_weights, ce, kl, proxy_perturbation, random_images, random_labels
from torch import Tensor, nn

from dynat.methods.perturbation import direction, perturbable, perturbed

GAMMA = 0.01
IMAGES, LABELS = random_images(1), random_labels(1)


def loss_of(network: nn.Module) -> Tensor:
    """The TRADES objective of the published AWP scripts, on some other images as the adversarial ones."""
    natural, adversarial = network(IMAGES), network(random_images(2))
    return ce(natural, LABELS).mean() + 6 * kl(natural, adversarial).mean()


def names(network: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    by_identity = {id(parameter): name for name, parameter in network.named_parameters()}
    return [by_identity[id(parameter)] for parameter in parameters]


def test_direction_equals_the_published_proxy_and_the_formula() -> None:
    network = Tiny(0).train()
    expected = proxy_perturbation(network, loss_of, GAMMA)
    parameters = perturbable(network)
    found = dict(zip(names(network, parameters), direction(loss_of(network), parameters, GAMMA), strict=True))
    assert set(found) == {"conv1.weight", "conv2.weight", "fc.weight", "sub_block1.0.weight"}
    loss_of(network).backward()
    for name, weight in network.named_parameters():
        if name not in found:
            assert weight.ndim <= 1  # biases and batch norm stay where they are
            continue
        v = found[name]
        assert torch.allclose(v, expected[name], rtol=1e-9, atol=1e-14)
        if weight.grad is None:  # never called
            assert not v.any()
            continue
        assert torch.allclose(v, GAMMA * weight.norm() * weight.grad / weight.grad.norm(), rtol=1e-12)
        assert v.norm().item() == pytest.approx(GAMMA * weight.norm().item(), rel=1e-12)


def test_frozen_and_oddly_named_parameters_and_zero_gradients_are_not_moved() -> None:
    network = Tiny(0).train()
    network.sub_block1.requires_grad_(False)
    network.register_parameter("scale", nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))
    parameters = perturbable(network)
    assert names(network, parameters) == ["conv1.weight", "conv2.weight", "fc.weight"]
    flat = 0 * loss_of(network)
    assert all(v.eq(0).all() for v in direction(flat, parameters, GAMMA))


def test_weights_return_to_the_bit_without_a_step_even_after_an_error() -> None:
    for dtype in (torch.float32, torch.float64):
        network = Tiny(0).to(dtype)
        parameters = perturbable(network)
        before = [parameter.clone() for parameter in parameters]
        offsets = [0.3 * torch.randn_like(parameter) for parameter in parameters]

        def run(
            fail: bool,
            parameters: list[nn.Parameter] = parameters,
            before: list[Tensor] = before,
            offsets: list[Tensor] = offsets,
        ) -> None:
            with perturbed(parameters, offsets):
                moved = zip(parameters, before, offsets, strict=True)
                assert all(torch.equal(parameter, old + v) for parameter, old, v in moved)
                if fail:
                    raise InterruptedError

        run(fail=False)
        assert all(map(torch.equal, parameters, before))
        with pytest.raises(InterruptedError):
            run(fail=True)
        assert all(map(torch.equal, parameters, before))


def test_a_step_inside_equals_the_published_add_step_subtract() -> None:
    """Gradient, momentum and weight decay act at w + v."""
    network = Tiny(0).train()
    published = copy.deepcopy(network)
    optimizers = [
        torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05) for n in (network, published)
    ]
    for _ in range(2):
        parameters = perturbable(network)
        with perturbed(parameters, direction(loss_of(network), parameters, GAMMA)):
            optimizers[0].zero_grad()
            loss_of(network).backward()
            optimizers[0].step()
        v = proxy_perturbation(published, loss_of, GAMMA)
        add_to_weights(published, v, +1)
        optimizers[1].zero_grad()
        loss_of(published).backward()
        optimizers[1].step()
        add_to_weights(published, v, -1)
    for (name, ours), theirs in zip(network.named_parameters(), published.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name
