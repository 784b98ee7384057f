"""Two steps of a recipe leave weights, momenta and running statistics as the published steps leave them."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published_steps import (
    Published,
)
from step_cases import (
    CASES,
    PARAMS,
    draw,
    networks,
    shipped,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dynat.config.recipe import Recipe
from dynat.methods.batches import Batch
from dynat.methods.step import Constants, Engine, StepLosses, constants
from dynat.networks.architectures import build


def test_every_recipe_of_params_is_among_the_cases() -> None:
    assert PARAMS["recipes"].keys() <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_two_steps_equal_the_published_ones(name: str) -> None:
    choice, published_step, rates = CASES[name]
    target, guide = networks()
    run = Published(copy.deepcopy(target), copy.deepcopy(guide), choice.schedule.weight_decay)
    engine = Engine(choice, target, guide if choice.needs_guide else None)
    for seed, (epoch, rate) in enumerate(rates.items(), start=20):
        batch = draw(choice, seed)
        engine.set_epoch(epoch)
        outcome = engine.step(batch)
        run.epoch, run.lr = epoch, rate
        of_target, of_guide = published_step(run, batch)
        assert outcome.target_loss.item() == pytest.approx(of_target.item(), rel=1e-9)
        assert outcome.guide_loss.item() == pytest.approx(of_guide.item(), rel=1e-9)
    for ours, theirs in ((target, run.t), (guide, run.g)):
        for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), key
        for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            zero = torch.zeros_like(mine)
            velocity = engine.optimizer.state.get(mine, {}).get("momentum_buffer", zero)
            published = run.momentum.get(id(other), zero)
            assert torch.allclose(velocity, published, rtol=1e-8, atol=1e-11), key


# ------------------------------------------------------------------------------- who learns from what


def after_step(choice: Recipe, epoch: int = 20) -> tuple[dict[str, Tensor], dict[str, Tensor], StepLosses]:
    target, guide = networks()
    engine = Engine(choice, target, guide)
    engine.set_epoch(epoch)
    outcome = engine.step(draw(choice, 20))
    return target.state_dict(), guide.state_dict(), outcome


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["dynat", "dynat_inner", "dynat_inner_awp", "dynat_inner_gairat"])
def test_target_and_guide_get_no_gradient_from_each_others_loss(name: str) -> None:
    choice = CASES[name][0]
    target, guide, _ = after_step(choice, 70)
    other_target, same_guide, _ = after_step(choice.model_copy(update={"alpha": 7.0}), 70)
    assert same(guide, same_guide)
    assert not same(target, other_target)
    smoothing = choice.smoothing.model_copy(update={"guide": 0.3})
    same_target, other_guide, _ = after_step(choice.model_copy(update={"smoothing": smoothing}), 70)
    assert same(target, same_target)
    assert not same(guide, other_guide)


def test_lbgats_mse_trains_both_networks() -> None:
    choice = CASES["lbgat0"][0]
    target, guide, _ = after_step(choice)
    other_target, other_guide, _ = after_step(choice.model_copy(update={"alpha": 7.0}))
    assert not same(guide, other_guide)
    assert not same(target, other_target)


def test_smoothing_of_the_target_changes_its_loss_alone_and_as_the_formula_says() -> None:
    choice = CASES["dynat_inner"][0]
    losses = []
    for amount in (0.0, 0.2, 0.4):
        smoothing = choice.smoothing.model_copy(update={"target": amount})
        losses.append(after_step(choice.model_copy(update={"smoothing": smoothing}))[2])
    zero, fifth, double = (outcome.target_loss.item() for outcome in losses)
    assert double - zero == pytest.approx(2 * (fifth - zero), rel=1e-9)  # linear in the amount
    assert fifth != pytest.approx(zero)
    assert len({outcome.guide_loss.item() for outcome in losses}) == 1


@pytest.mark.parametrize("name", ["at_awp", "dynat_inner_gairat", "dynat_at_mail"])
def test_the_truth_and_the_guides_label_are_told_apart_where_the_recipe_does(name: str) -> None:
    choice, found = shipped(name), []
    for truth in (True, False):
        if name == "at_awp":
            awp = choice.awp and choice.awp.model_copy(update={"labels": "truth" if truth else "guide"})
            changed = choice.model_copy(update={"awp": awp, "labels": "guide"})
        else:
            weights = choice.weights.model_copy(update={"against": "truth" if truth else "label"})
            changed = choice.model_copy(update={"weights": weights})
        found.append(after_step(changed, 80)[0])
    assert not same(*found)


def test_guide_accuracy_of_a_step_is_counted_before_the_update() -> None:
    choice = CASES["dynat_inner"][0]
    _, guide = networks()
    batch = draw(choice, 20)
    expected = sum(
        row.index(max(row)) == y
        for row, y in zip(guide.train()(batch.images).tolist(), batch.truth.tolist(), strict=True)
    )
    assert after_step(choice)[2].guide_correct.item() == expected


def test_learning_rate_of_lbgat_over_its_epochs() -> None:
    engine = Engine(CASES["dynat_inner"][0], *networks())
    for epochs, rate in (
        (range(1), 0.02),
        (range(1, 75), 0.1),
        (range(75, 90), 0.01),
        (range(90, 100), 0.001),
    ):
        for epoch in epochs:
            engine.set_epoch(epoch)
            assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("name", PARAMS["recipes"])
def test_in_epochs_of_equal_constants_a_step_is_the_same_to_the_bit(name: str) -> None:
    choice = shipped(name)
    last: dict[Constants, int] = {constants(choice, epoch): epoch for epoch in range(choice.schedule.epochs)}
    seen: set[Constants] = set()
    for epoch in range(choice.schedule.epochs):
        now = constants(choice, epoch)
        if now not in seen and last[now] > epoch and len(seen) < 4:
            weights = [after_step(choice, each)[0] for each in (epoch, last[now])]
            for key, value in weights[0].items():
                assert torch.equal(value, weights[1][key]), (epoch, last[now], key)
        seen.add(now)
    assert seen


# --------------------------------------------------------------------- what a step does not do


SMALL: dict[str, dict[str, Any]] = {
    "cnn": {"depth": 1},
    "resnet": {"blocks": [1, 1], "strides": [1, 2]},
}


def little(
    name: str, precision: torch.dtype = torch.float32, fold: bool = True, steps: int = 1, family: str = "cnn"
) -> tuple[Any, Batch]:
    """A recipe's engine past every burn-in, with ``steps`` inner ones at most, and a batch."""
    choice = shipped(name)
    inner = choice.inner.model_copy(update={"steps": min(steps, choice.inner.steps)})
    choice = choice.model_copy(update={"inner": inner})
    target, guide = (build(family, 5, 3, width=4, **SMALL[family]) for _ in range(2))
    images, truth = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    stop = choice.inner.stop
    jitter = torch.randn(choice.inner.steps, *images.shape) if stop and stop.noise else None
    engine = Engine(choice, target, guide if choice.needs_guide else None, precision, fold=fold)
    engine.set_epoch(choice.schedule.epochs - 1)
    return engine, Batch(images, truth, torch.rand_like(images), jitter)


class Fake(FakeTensorMode):
    """Tensors without values that say they are on a device which is not there."""

    def __deepcopy__(self, memo: object) -> "Fake":
        return self  # as of a tensor that is copied: copies are of the same mode


FAKE = Fake()  # one for all: a second one would meet tensors of the first


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """CUDA as far as it goes without a device: PyTorch's backward needs one, so gradients are zeros."""

    def gradients(outputs: Tensor, inputs: Tensor | Sequence[Tensor], **options: Any) -> list[Tensor]:
        assert outputs.device.type == "cuda"
        return [torch.zeros_like(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs)]

    def backward(loss: Tensor) -> None:
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)

    def take_over(parameter: Tensor, converted: Tensor) -> None:
        parameter.data = converted.data

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.utils, "swap_tensors", take_over)  # refuses what the mode has a reference to
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    return FAKE


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARAMS["recipes"])
def test_no_forward_and_no_loss_of_a_step_mixes_the_gpus_tensors_with_the_hosts(
    name: str, precision: torch.dtype, fake: Fake
) -> None:
    with fake, torch.device("cuda"):
        engine, batch = little(name, precision)
        outcome = engine.step(batch)
        assert outcome.target_loss.device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            batch.images + torch.ones(batch.images.shape, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMS["recipes"])
def test_the_compiler_sees_a_step_up_to_its_update_as_one_graph(name: str) -> None:
    """No value of a tensor decides anything; PyTorch's optimiser breaks graphs on purpose and is left out."""
    engine, batch = little(name)
    engine.step(batch)  # the folded copy is made once
    engine.optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch._dynamo.explain(engine.step)(batch)
    torch._dynamo.reset()
    assert (found.graph_count, found.break_reasons) == (1, [])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", PARAMS["recipes"])
def test_no_step_reads_a_value_from_the_device(name: str, fold: bool) -> None:
    """Tensors without values: whoever asks for one, as ``.item()`` and ``.nonzero()`` do, fails."""
    with torch.device("meta"):
        engine, batch = little(name, fold=fold, steps=2, family="resnet")
    for _ in range(2):
        outcome = engine.step(batch)
    assert outcome.target_loss.shape == ()
    images, truth = batch.images, batch.truth
    for reading in (outcome.target_loss.item, truth.nonzero, lambda: images[truth > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading()
