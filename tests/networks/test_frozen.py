"""The simplified copy that the inner loop attacks is the network in eval mode, up to rounding."""

import copy
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import CASES, draw
from step_cases import networks as pair
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dynat.errors import UserError
from dynat.methods.step import Engine
from dynat.networks.architectures import build
from dynat.networks.frozen import Frozen, _Reversible
from dynat.runtime.machine import compiler

COMPILES = pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile needs g++ and Python's headers, which are not here",
)
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"blocks": [1, 2], "strides": [1, 2], "width": 4},
    "preact_resnet": {"blocks": [1, 2], "strides": [1, 2], "width": 4},
    "wrn": {"depth": 10, "widen": 1, "sub_block1": True},
    "cnn": {"width": 4, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]},
}


def lived_in(name: str) -> nn.Module:
    """A float64 network whose batch norms are anything but the identity."""
    torch.manual_seed(0)
    network = build(name, 5, 3, **NETWORKS[name]).double()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + (0.1 if "var" in key else -0.3))
    return network.eval()


def values(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of a fixed function of them with respect to the input."""
    point = x.clone().requires_grad_()
    logits = function(point)
    (gradient,) = torch.autograd.grad(logits.square().sum(), point)
    return logits.detach(), gradient


def distance(mine: Tensor, other: Tensor) -> float:
    """Relative distance of an ordinary sample: where rounding turns a ReLU, a gradient is far off."""
    apart, size = (mine - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    return (apart / size).median().item()


def half(function: Any) -> Any:
    """The function under bfloat16 autocast."""

    def forward(point: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(point).float()

    return forward


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_input_gradients_are_the_networks_own_also_after_a_refresh(name: str) -> None:
    network, x = lived_in(name), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    folded = Frozen(network, x[:1])
    assert any(isinstance(module, nn.Identity) for module in folded.copy.modules())
    for _ in range(2):
        for mine, own in zip(values(folded, x), values(network, x), strict=True):
            assert torch.allclose(mine, own, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for value in network.state_dict().values():
                value.mul_(2)
        assert not torch.allclose(folded(x), network(x))
        folded.refresh()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_shares_no_memory_with_the_network_and_asks_for_no_weight_gradient(name: str) -> None:
    network, x = lived_in(name), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    folded = Frozen(network, x[:1])
    own = {parameter.data_ptr() for parameter in network.parameters()}
    assert not own & {parameter.data_ptr() for parameter in folded.copy.parameters()}
    assert not any(parameter.requires_grad for parameter in folded.copy.parameters())
    folded.refresh()
    folded(x)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_in_bfloat16_the_folded_network_is_as_near_to_the_exact_one_as_the_network_itself(name: str) -> None:
    exact = lived_in(name)
    network, x = copy.deepcopy(exact).float(), torch.rand(64, 3, 8, 8)
    folded = Frozen(network, x[:1], torch.bfloat16)
    reversible = any(isinstance(module, _Reversible) for module in folded.copy.modules())
    assert reversible == (name != "cnn")  # whose layers all have a stride or read the pixels

    expected = values(exact, x.double())
    for mine, own, truth in zip(values(half(folded), x), values(half(network), x), expected, strict=True):
        assert distance(mine, truth) < 2 * distance(own, truth)
        assert distance(mine, truth) < 0.03
        if truth.ndim == 2:  # logits, which no turned ReLU moves far: all samples together too
            error, reference = (mine - truth).norm(), (own - truth).norm()
            assert error < 5 * reference
            assert error < 0.1 * truth.norm()


@pytest.mark.parametrize("name", CASES)
def test_a_step_on_the_folded_target_gives_the_same_weights_and_statistics(name: str) -> None:
    choice, _, rates = CASES[name]
    engines = [Engine(choice, *pair(), fold=fold) for fold in (False, True)]
    for seed, epoch in enumerate(rates, start=20):
        for engine in engines:
            engine.set_epoch(epoch)
        plain, folded = (engine.step(draw(choice, seed)) for engine in engines)
        assert folded.target_loss.item() == pytest.approx(plain.target_loss.item(), rel=1e-9)
    for network in ("target", "guide"):
        states = [getattr(engine, network).state_dict() for engine in engines]
        for key, value in states[0].items():
            assert torch.allclose(states[1][key], value, rtol=1e-8, atol=1e-11), key


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("name", ["trades", "dynat_inner_awp"])
def test_a_compiled_inner_loop_gives_the_same_weights_also_on_a_smaller_last_batch(name: str) -> None:
    counters.clear()
    choice, _, rates = CASES[name]
    engines = [Engine(choice, *pair(), fold=True, compiled=compiled) for compiled in (False, True)]
    for seed, count in ((20, 6), (21, 6), (22, 4)):
        for engine in engines:
            engine.set_epoch(max(rates))
        plain, compiled = (engine.step(draw(choice, seed, count)) for engine in engines)
        assert compiled.target_loss.item() == pytest.approx(plain.target_loss.item(), rel=1e-9)
    forwards = 2 if choice.inner.loss == "kl" else 1  # KL: also one without gradient
    assert counters["stats"]["unique_graphs"] == 2 * forwards  # of two batch sizes
    for key, value in engines[0].target.state_dict().items():
        assert torch.allclose(engines[1].target.state_dict()[key], value, rtol=1e-8, atol=1e-11), key


@COMPILES
@pytest.mark.slow
def test_compiled_in_bfloat16_a_network_has_the_logits_and_gradients_that_it_has_uncompiled() -> None:
    network, x = lived_in("wrn").float(), torch.rand(64, 3, 8, 8)
    folded, compiled = (Frozen(network, x[:1], torch.bfloat16) for _ in range(2))
    counters.clear()
    torch._dynamo.reset()
    compiled.copy.compile(dynamic=False, fullgraph=True)

    for mine, own in zip(values(half(compiled), x), values(half(folded), x), strict=True):
        assert distance(mine, own) < 0.03
        if own.ndim == 2:
            assert (mine - own).norm() < 0.05 * own.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_without_the_compiler_of_the_device_a_compiled_training_is_refused_by_its_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("clang", "clang++"):  # torch.compile takes these for CUDA, not for a CPU
        (tmp_path / name).write_text("#!/bin/sh\necho clang version 1\necho more\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    assert compiler("key", torch.device("cuda")) == "clang version 1"
    with pytest.raises(UserError, match=r"^some\.key: found no compiler g\+\+; .* set some\.key=false$"):
        compiler("some.key", torch.device("cpu"))
    monkeypatch.setenv("CXX", "clang++ -O1")
    assert compiler("key", torch.device("cpu")) == "clang version 1"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"^some\.key: Python\.h is not here; .* set some\.key=false$"):
        compiler("some.key", torch.device("cpu"))
