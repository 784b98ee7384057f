"""What only a CUDA device can show: every recipe steps, its bits repeat, a graph changes none, verdicts hold.

Needs neither dvc nor mlflow nor pandas, and no conftest: ``pytest --noconftest tests/test_cuda.py``.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyautoattack import AutoAttack as Package
from torch import Tensor, nn

from dynat.config.attack import Attack, AutoAttack
from dynat.config.params import Machine, parse
from dynat.config.recipe import Precision, Recipe
from dynat.evaluation import autoattack, whitebox
from dynat.methods.batches import Batch
from dynat.methods.captured import WARM_UP, CapturedSteps
from dynat.methods.step import Engine, StepLosses
from dynat.networks.architectures import build
from dynat.runtime import machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RECIPES = parse(yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())).recipes
SIZE, SIDE = 32, 16
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The device, set up as a stage does."""
    machine.pin(Machine(device="cuda"))
    yield machine.device_of(Machine(device="cuda"), "machine")
    torch.backends.cudnn.allow_tf32 = False


def batch_of(recipe: Recipe, seed: int, where: torch.device, size: int = SIZE) -> Batch:
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand((size, 3, SIDE, SIDE), generator=stream)
    draw = torch.rand if recipe.inner.start == "uniform" else torch.randn
    stop = recipe.inner.stop
    noisy = stop is not None and stop.noise > 0
    jitter = torch.randn((recipe.inner.steps, *images.shape), generator=stream).to(where) if noisy else None
    truth = torch.randint(10, (size,), generator=stream).to(where)
    return Batch(images.to(where), truth, draw(images.shape, generator=stream).to(where), jitter)


def engine_of(recipe: Recipe, where: torch.device, precision: str = "fp32", compiled: bool = False) -> Engine:
    torch.manual_seed(0)
    scale = {"mean": [0.5] * 3, "std": [0.25] * 3} if recipe.normalise else {}
    target, guide = (
        build("resnet", 10, 3, blocks=[1, 1], strides=[1, 2], width=16, **scale)
        .to(where)
        .to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    engine = Engine(recipe, target, guide if recipe.needs_guide else None, products, True, compiled)
    engine.set_epoch(recipe.schedule.epochs - 1, 0.5)  # past every burn-in, and no rate is 0
    return engine


def state(engine: Engine) -> list[Tensor]:
    return [each.cpu() for network in engine.networks.values() for each in network.state_dict().values()]


def momenta(engine: Engine) -> Tensor:
    """After the first step: gradient and weight decay of every parameter."""
    found = [engine.optimizer.state[each]["momentum_buffer"] for each in engine.parameters]
    return torch.cat([each.cpu().double().flatten() for each in found])


def same(one: Engine, other: Engine) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))
    return equal and torch.equal(momenta(one), momenta(other))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_same_bits_twice_and_as_a_graph(
    name: str, precision: str, device: torch.device
) -> None:
    recipe = RECIPES[name]
    engines = [engine_of(recipe, device, precision) for _ in range(3)]
    for engine in engines:
        engine.set_epoch(0)  # before every burn-in
    captured = CapturedSteps(engines[2], SIZE)
    for number in range(WARM_UP + 5):
        small = number == WARM_UP + 2  # the last batch of an epoch; past every burn-in full ones again
        batch = batch_of(recipe, number, device, SIZE // 2 if small else SIZE)
        losses = [*(engine.step(batch) for engine in engines[:2]), captured(batch)]
        assert all(bool(each.target_loss.isfinite()) for each in losses)
        assert len({tuple(float(value) for value in each) for each in losses}) == 1
        if small:
            for engine in engines:
                engine.set_epoch(recipe.schedule.epochs - 1, 0.5)
    assert captured.recorded is not None
    assert same(engines[0], engines[1])
    assert same(engines[0], engines[2])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_first_step_agrees_with_the_cpus(name: str, device: torch.device) -> None:
    recipe, cpu = RECIPES[name], torch.device("cpu")
    losses: list[StepLosses] = []
    gradients: list[Tensor] = []
    for where in (cpu, device):
        engine = engine_of(recipe, where)
        losses.append(engine.step(batch_of(recipe, 0, where)))
        gradients.append(momenta(engine))
    # signs of the inner attack hang on rounding where a gradient is nearly zero
    assert losses[1].target_loss.item() == pytest.approx(losses[0].target_loss.item(), rel=1e-2)
    assert losses[1].guide_loss.item() == pytest.approx(losses[0].guide_loss.item(), rel=1e-4)
    assert losses[1].guide_correct.item() == losses[0].guide_correct.item()
    # float32 is up to 0.13 from float64 on a CPU (sat), 0.1 where the attack is in train mode, else 0.01
    assert (gradients[1] - gradients[0]).norm() < 0.3 * gradients[0].norm()


def test_the_compiled_copy_trains_as_a_graph_too(device: torch.device) -> None:
    recipe = RECIPES["dynat_inner"]
    engines = [engine_of(recipe, device, "bf16", compiled=True) for _ in range(2)]
    captured = CapturedSteps(engines[1], SIZE)
    for number in range(WARM_UP + 2):
        batch = batch_of(recipe, number, device)
        engines[0].step(batch)
        captured(batch)
    assert same(*engines)


def test_a_stopped_training_goes_on_as_a_graph_to_the_bits_of_eager_steps(device: torch.device) -> None:
    recipe = RECIPES["dynat_awp"]
    eager, stopped = (engine_of(recipe, device) for _ in range(2))
    for part in range(2):
        file = io.BytesIO()  # by way of the CPU, as the state of a training
        states = {name: network.state_dict() for name, network in stopped.networks.items()}
        torch.save([states, stopped.optimizer.state_dict()], file)
        file.seek(0)
        states, optimizer = torch.load(file, map_location="cpu", weights_only=True)
        stopped = engine_of(recipe, device)
        for name, network in stopped.networks.items():
            network.load_state_dict(states[name])
        stopped.optimizer.load_state_dict(optimizer)
        captured = CapturedSteps(stopped, SIZE)
        for number in range(WARM_UP + 2):
            batch = batch_of(recipe, 10 * part + number, device)
            eager.step(batch)
            captured(batch)
        assert captured.recorded is not None
        assert same(eager, stopped)


def test_a_resnet18_pair_trains_in_bf16_within_2_gib_and_a_half(device: torch.device) -> None:
    recipe = RECIPES["dynat_inner"]
    target, guide = (
        build("resnet", 10, 3, strides=[1, 1, 2, 2]).to(device).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    engine = Engine(recipe, target, guide, torch.bfloat16, True)
    torch.cuda.reset_peak_memory_stats()
    images = torch.rand(128, 3, 32, 32, device=device)
    truth = torch.randint(10, (128,), device=device)
    engine.step(Batch(images, truth, torch.randn_like(images), None))
    assert torch.cuda.max_memory_allocated() < 2.5 * 2**30


# --------------------------------------------------------------------------------- evaluation


def trained(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, images and the labels that it gives them, all on ``device``."""
    torch.manual_seed(0)
    network = build("resnet", 10, 3, blocks=[1, 1], strides=[1, 2], width=16)
    images = torch.randint(0, 256, (64, 3, SIDE, SIDE), dtype=torch.uint8)
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        for _ in range(20):
            network.train()(images / 255)  # statistics
        last.bias.sub_(network.eval()(images / 255).mean(0))  # so that no class outweighs the others
        labels = network(images / 255).argmax(1)
    network.requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    return network, images.to(device), labels.to(device)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_white_box_verdicts_are_the_cpus_but_for_rounding(precision: Precision, device: torch.device) -> None:
    spec = Attack(epsilon=0.005, step=0.00125, pgd=[5, 10], batch=32, apgd_steps=10, precision=precision)
    expected = whitebox.evaluate(*trained(torch.device("cpu")), spec, whitebox.ATTACKS)
    network, images, labels = trained(device)
    found = whitebox.evaluate(network, images, labels, spec, whitebox.ATTACKS)
    assert 8 < int(expected["pgd10"].robust.sum()) < 56
    for name, evidence in found.items():
        differing = int((evidence.robust.cpu() != expected[name].robust).sum())
        assert differing <= (2 if precision == "fp32" else 6), name
        if name != "clean":  # every success is one in float32
            assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()


class Short(Package):
    """Few steps and queries."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 100


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autoattack_claims_no_false_success_on_the_device(
    precision: Precision, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoattack, "Package", Short)
    network, images, labels = trained(device)
    spec = AutoAttack(epsilon=0.005, n=[16], batch=16, precision=precision)
    found, _ = autoattack.evaluate(network, images[:16], labels[:16], spec)
    evidence = found["square"]
    assert 0 < len(evidence.indices) == int((~evidence.robust).sum())
    assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()
    assert ((evidence.images - images[evidence.indices] / 255).abs() <= 0.005 + 1e-6).all()
