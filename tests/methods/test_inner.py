"""A training that attacks a folded, a compiled or a bfloat16 copy of its target trains the same network."""

import shutil
import sysconfig
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import random_images
from step_cases import CASES, draw
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dynat.methods.inner import autocast
from dynat.methods.step import Engine
from dynat.networks.architectures import build
from dynat.networks.folded import mixed

COMPILES = pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile needs g++ and Python's headers, which are not here",
)


def smooth(seed: int, width: int = 4) -> nn.Module:
    """What :class:`helpers.Tiny` computes, float64 and smooth, as a chain whose batch norms can be folded."""
    torch.manual_seed(seed)
    layers = {
        "conv1": nn.Conv2d(2, width, 3, padding=1),
        "bn1": nn.BatchNorm2d(width),
        "silu1": nn.SiLU(),
        "conv2": nn.Conv2d(width, width, 3, bias=False),
        "bn2": nn.BatchNorm2d(width),
        "silu2": nn.SiLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(width, 3),
    }
    network = nn.Sequential(OrderedDict(layers)).double()
    with torch.no_grad():
        network.fc.weight.mul_(25)  # sharp enough that small perturbations change predictions
        network(random_images(50))
    return network


def assert_same(engines: list[Engine]) -> None:
    for network in ("target", "guide"):
        states = [getattr(engine, network).state_dict() for engine in engines]
        for key, value in states[0].items():
            assert torch.allclose(states[1][key], value, rtol=1e-8, atol=1e-11), key


@pytest.mark.parametrize("name", CASES)
def test_steps_on_the_folded_target_leave_the_same_weights_and_statistics(name: str) -> None:
    choice, _, rates = CASES[name]
    engines = [Engine(choice, smooth(0), smooth(1, width=5), fold=fold) for fold in (False, True)]
    for seed, epoch in enumerate(rates, start=20):
        for engine in engines:
            engine.set_epoch(epoch)
        plain, folded = (engine.step(draw(choice, seed)) for engine in engines)
        assert folded.target_loss.item() == pytest.approx(plain.target_loss.item(), rel=1e-9)
    copied = engines[1].inner.folded
    assert (copied is None) == (choice.inner.steps == 0 or choice.inner.mode == "train")
    assert copied is None or not any(isinstance(layer, nn.BatchNorm2d) for layer in copied.modules())
    assert_same(engines)


def test_matrix_products_are_in_the_precision_asked_for() -> None:
    x = torch.rand(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with autocast(x.device, precision):
            assert (x @ x).dtype == precision
    with autocast(x.device, torch.float32):
        assert (x.double() @ x.double()).dtype == torch.float64


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("name", ["trades", "dynat_inner_awp"])
def test_a_compiled_inner_loop_gives_the_same_weights_also_on_a_smaller_last_batch(name: str) -> None:
    torch._dynamo.reset()  # or the graphs of another test are used again
    counters.clear()
    choice, _, rates = CASES[name]
    engines = [Engine(choice, smooth(0), smooth(1), fold=True, compiled=each) for each in (False, True)]
    for seed, count in ((20, 6), (21, 6), (22, 4)):
        for engine in engines:
            engine.set_epoch(max(rates))
        plain, compiled = (engine.step(draw(choice, seed, count)) for engine in engines)
        assert compiled.target_loss.item() == pytest.approx(plain.target_loss.item(), rel=1e-9)
    forwards = 2 if choice.inner.loss == "kl" else 1  # KL: also one without gradient
    assert counters["stats"]["unique_graphs"] == 2 * forwards  # of two batch sizes
    assert_same(engines)


@COMPILES
@pytest.mark.slow
def test_compiled_in_bfloat16_a_network_has_the_logits_and_gradients_that_it_has_uncompiled() -> None:
    torch.manual_seed(0)
    network = build("wrn", 5, 3, depth=10, widen=1, sub_block1=True).double()
    with torch.no_grad():
        for key, value in network.state_dict().items():  # batch norms that are anything but the identity
            if value.ndim == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + (0.1 if "var" in key else -0.3))
    network, x = network.float().eval(), torch.rand(64, 3, 8, 8, requires_grad=True)
    folded, compiled = mixed(network), mixed(network)
    counters.clear()
    torch._dynamo.reset()
    compiled.network.compile(dynamic=False, fullgraph=True)

    def logits_and_gradient(copied: nn.Module) -> tuple[Tensor, Tensor]:
        logits = copied(x)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]

    for mine, own in zip(logits_and_gradient(compiled), logits_and_gradient(folded), strict=True):
        apart = (mine - own).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)
        assert apart.median() < 0.03  # of an ordinary sample: where rounding turns a ReLU, it is far off
        if own.ndim == 2:
            assert (mine - own).norm() < 0.05 * own.norm()
    assert counters["stats"]["unique_graphs"] == 1
