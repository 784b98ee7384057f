"""Two steps of a recipe leave weights, momenta and running statistics as the published steps leave them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Tiny, random_images, random_labels, stream
from published_steps import (
    Published,
    Step,
    dynat,
    dynat_fat,
    dynat_gairat,
    dynat_mail,
    fat,
    gairat,
    lbgat,
    mail,
    mart,
    natural,
    rice,
    sat,
    trades,
    trades_awp,
)
from torch import Tensor

from dynat.networks import build
from dynat.recipes import Recipe
from dynat.step import Batch, Engine, Outcome

PARAMS = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
LBGAT = {
    "epochs": 100,
    "lr": 0.1,
    "first_epoch_lr": 0.02,
    "drops": {75: 0.1, 90: 0.01},
    "weight_decay": 2e-4,
}
LONG = {"epochs": 120, "lr": 0.01, "drops": {75: 0.1, 90: 0.01, 100: 0.001}, "weight_decay": 3.5e-3}
STRONG = {"epsilon": 0.2, "step": 0.05}  # so that kappa and the early stop differ between samples


def shipped(name: str, **changes: Any) -> Recipe:
    return Recipe(**PARAMS["recipes"][name] | changes)


def recipe(inner: dict[str, Any], outer: dict[str, Any], target: list[str], **more: Any) -> Recipe:
    schedule = more.pop("schedule", LONG)
    forwards = {"target": target, "guide": more.pop("guide", 1)}
    return Recipe(inner=inner, outer=outer, batch_norm=forwards, schedule=schedule, **more)


KL, CE = {"loss": "kl", "start": "gaussian"}, {"loss": "ce", "start": "gaussian"}
MSE_KL = {"adversarial": "mse", "beta": 6}
AWP_GUIDE = {"gamma": 0.005, "labels": "guide", "objective": {"adversarial": "ce"}}
GAIRAT = {"rule": "gairat", "begin": 60}
FRIENDLY = STRONG | {"start": "uniform", "stop": {"budget": {0: 0, 50: 1, 90: 2}, "noise": 0.001}}

# name: (recipe, published step, {epoch: learning rate})
CASES: dict[str, tuple[Recipe, Step, dict[int, float]]] = {
    "natural": (shipped("natural"), natural, {0: 0.1, 90: 0.001}),
    "pgd_at": (shipped("pgd_at"), rice(awp=False, loss_check=True), {0: 0.1, 100: 0.01}),
    "trades": (shipped("trades"), trades, {0: 0.1, 74: 0.01}),
    "at_awp": (shipped("at_awp"), rice(awp=True, loss_check=True), {0: 0.1, 1: 0.1}),
    "trades_awp": (shipped("trades_awp"), trades_awp, {8: 0.1, 9: 0.1}),
    "dynat": (shipped("dynat"), dynat("kl"), {0: 0.02, 1: 0.1}),
    "dynat_inner": (shipped("dynat_inner"), dynat("dynamic"), {0: 0.02, 1: 0.1}),
    "dynat_inner_alpha": (
        shipped("dynat_inner", alpha=0.2),
        dynat("dynamic", alpha=0.2),
        {0: 0.02, 75: 0.01},
    ),
    "dynat_ordinary_pgd": (
        shipped("dynat", inner=CE, batch_norm={"target": ["adversarial", "natural"]}),
        dynat("ce"),
        {0: 0.02, 90: 0.001},
    ),
    "dynat_awp_b0": (shipped("dynat_awp_b0"), dynat("kl", awp=True, guide=2), {8: 0.1, 9: 0.1}),
    "dynat_awp": (shipped("dynat_awp"), dynat("kl", beta=1, awp=True, guide=2), {8: 0.1, 9: 0.1}),
    "dynat_awp_cifar100": (
        shipped("dynat_awp", alpha=0.2),
        dynat("kl", alpha=0.2, beta=1, awp=True, guide=2),
        {10: 0.1, 11: 0.1},
    ),
    "dynat_inner_awp": (
        shipped("dynat_inner_awp"),
        dynat("dynamic", beta=1, awp=True, guide=2),
        {8: 0.1, 9: 0.1},
    ),
    "mart": (
        shipped("mart", outer={"adversarial": "bce", "beta": 5, "kl": "mart"}),
        mart,
        {0: 0.1, 74: 0.01},
    ),
    "fat": (
        shipped("fat", inner=PARAMS["recipes"]["fat"]["inner"] | STRONG),
        fat,
        {49: 0.1, 50: 0.1},
    ),
    "gairat": (
        shipped("gairat", inner=PARAMS["recipes"]["gairat"]["inner"] | STRONG),
        gairat(59, dynamic=False),
        {58: 0.1, 59: 0.01},
    ),
    "lbgat0": (shipped("lbgat0"), lbgat(0), {0: 0.02, 1: 0.1}),
    "lbgat6": (shipped("lbgat6"), lbgat(6), {0: 0.02, 75: 0.01}),
    "mail_at": (shipped("mail_at"), mail("ce", 76), {75: 0.001, 76: 0.001}),
    "mail_trades": (shipped("mail_trades"), mail("kl", 76), {75: 0.001, 76: 0.001}),
    "sat": (shipped("sat"), sat, {10: 0.1, 40: 0.1}),
    "mail_mse": (shipped("mail_mse"), dynat_mail(False, mse=True), {75: 0.001, 76: 0.001}),
    "dynat_at_mail": (shipped("dynat_at_mail"), dynat_mail(False), {75: 0.001, 76: 0.001}),
    "dynat_mail_inner": (shipped("dynat_mail_inner"), dynat_mail(True), {75: 0.001, 76: 0.001}),
    "dynat_gairat": (
        shipped("dynat_gairat", inner=PARAMS["recipes"]["dynat_gairat"]["inner"] | STRONG),
        dynat_gairat(False),
        {69: 0.01, 70: 0.01},
    ),
    "dynat_inner_gairat": (
        shipped("dynat_inner_gairat", inner=PARAMS["recipes"]["dynat_inner_gairat"]["inner"] | STRONG),
        dynat_gairat(True),
        {69: 0.01, 70: 0.01},
    ),
    "lbgat_awp_on_dynamic_labels": (
        recipe(KL, MSE_KL, ["adversarial", "natural"], awp=AWP_GUIDE, schedule=LBGAT),
        lbgat(6, awp=True),
        {0: 0.02, 1: 0.1},
    ),
    "dynat_inner_gairat_kappa_of_truth": (
        recipe(
            {"loss": "ce_dynamic", "start": "uniform"} | STRONG,
            {"adversarial": "ce"},
            ["adversarial"],
            labels="guide",
            weights=GAIRAT | {"against": "truth"},
            guide=2,
        ),
        gairat(60, dynamic=True, count_truth=True),
        {60: 0.01, 61: 0.01},
    ),
    "dynat_fat": (
        recipe(FRIENDLY | {"loss": "ce_dynamic"}, {"adversarial": "ce"}, ["adversarial"], labels="guide"),
        dynat_fat,
        {49: 0.01, 50: 0.01},
    ),
}


def draw(choice: Recipe, seed: int, count: int = 6) -> Batch:
    images = random_images(seed, count)
    sample = torch.rand if choice.inner.start == "uniform" else torch.randn
    start = sample(images.shape, generator=stream(seed), dtype=torch.float64)
    jitter = torch.randn((choice.inner.steps, *images.shape), generator=stream(seed + 1), dtype=torch.float64)
    return Batch(images, random_labels(seed, count), start, jitter if choice.inner.stop else None)


def networks() -> tuple[Tiny, Tiny]:
    """Target and guide, with statistics that have seen something."""
    target, guide = Tiny(0), Tiny(1, width=5)
    with torch.no_grad():
        for network in (target, guide):
            network(random_images(50))
    return target, guide


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
    velocities = dict(zip(map(id, engine.optimizer.parameters), engine.optimizer.velocity, strict=True))
    for ours, theirs in ((target, run.t), (guide, run.g)):
        for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), key
        for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            zero = torch.zeros_like(mine)
            velocity, published = velocities.get(id(mine), zero), run.momentum.get(id(other), zero)
            assert torch.allclose(velocity, published, rtol=1e-8, atol=1e-11), key


# ------------------------------------------------------------------------------- who learns from what


def after_step(choice: Recipe, epoch: int = 20) -> tuple[dict[str, Tensor], dict[str, Tensor], Outcome]:
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
            assert engine.optimizer.lr == pytest.approx(rate)


# --------------------------------------------------------------------- what a step does not do


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", PARAMS["recipes"])
def test_no_step_reads_a_value_from_the_device(name: str, fold: bool) -> None:
    """Tensors without values: whoever asks for one, as ``.item()`` and ``.nonzero()`` do, fails."""
    choice = shipped(name)
    with torch.device("meta"):
        target, guide = (build("resnet", 5, 3, blocks=[1, 1], strides=[1, 2], width=4) for _ in range(2))
        images, truth = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
        stop = choice.inner.stop
        jitter = torch.randn(choice.inner.steps, *images.shape) if stop and stop.noise else None
    engine = Engine(choice, target, guide if choice.needs_guide else None, fold=fold)
    engine.set_epoch(choice.schedule.epochs - 1)  # past every burn-in
    for _ in range(2):
        outcome = engine.step(Batch(images, truth, torch.rand_like(images), jitter))
    assert outcome.target_loss.shape == ()
    for reading in (outcome.target_loss.item, truth.nonzero, lambda: images[truth > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading()
