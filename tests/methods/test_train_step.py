"""The engine trains as the published transcription that it is timed against: losses, band, end result."""

import copy
from functools import cache
from itertools import cycle, islice

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.published import STEPS, Published
from benchmarks.train_step import batches, engine_of, multiply_adds, networks, work_per_image
from dynat.config.params import load
from dynat.config.recipe import Recipe
from dynat.config.train import rescale
from dynat.data.splits import Splits
from dynat.methods import attacks
from dynat.methods.batches import Batch
from dynat.methods.step import Engine
from dynat.methods.training import Training
from dynat.networks.architectures import build

PARAMS = load()
CPU = torch.device("cpu")
STEP_COUNT = 20
BAND = 0.1  # relative, of bf16 losses over 20 steps against float32
KL = ("trades", "dynat")  # near x their attack's gradient is rounding alone, and the step takes its sign


def losses(method: str, precision: torch.dtype) -> list[list[tuple[float, float]]]:
    """Losses (target, guide) per step of the transcription and of the engine, on the same batches.

    ``precision`` is the engine's; the transcription is float64 where the engine is, else float32.
    """
    both = torch.float64 if precision == torch.float64 else torch.float32
    recipe, target, guide, drawn = beginning(method, both)
    engine = engine_of(
        recipe, target, guide, torch.bfloat16 if precision == torch.bfloat16 else torch.float32
    )
    done = [engine.step(batch) for batch in islice(cycle(drawn), STEP_COUNT)]
    return [transcribed(method, both), [(each.target_loss.item(), each.guide_loss.item()) for each in done]]


@cache
def transcribed(method: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """The losses of the transcription."""
    recipe, target, guide, drawn = beginning(method, dtype)
    published = Published(method, recipe, target, guide)
    pairs = [published.step(batch) for batch in islice(cycle(drawn), STEP_COUNT)]
    return [(of_target.item(), of_guide.item()) for of_target, of_guide in pairs]


def beginning(method: str, dtype: torch.dtype) -> tuple[Recipe, nn.Module, nn.Module | None, list[Batch]]:
    """What both start from: recipe, networks and batches in ``dtype``."""
    recipe = slower(PARAMS.recipes[method])
    target, guide, shape = networks("cnn", recipe, CPU)
    for network in filter(None, (target, guide)):
        network.to(dtype)
    drawn = batches(recipe, shape, 16, 4, CPU)
    return (
        recipe,
        target,
        guide,
        [b._replace(images=b.images.to(dtype), start=b.start.to(dtype)) for b in drawn],
    )


def slower(recipe: Recipe) -> Recipe:
    """A learning rate at which rounding is not amplified from step to step."""
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"lr": 0.01})})


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_losses_agree_to_rounding_over_20_steps(method: str, precision: torch.dtype) -> None:
    published, engine = losses(method, precision)
    assert published[0][0] != published[-1][0]
    rounding = 1e-9 if precision == torch.float64 else 1e-2 if method in KL else 1e-5
    for theirs, ours in zip(published, engine, strict=True):
        assert ours == pytest.approx(theirs, rel=rounding)


@pytest.mark.parametrize("method", STEPS)
def test_in_bfloat16_losses_stay_within_the_stated_band_over_20_steps(method: str) -> None:
    published, engine = losses(method, torch.bfloat16)
    assert published != engine
    for theirs, ours in zip(published, engine, strict=True):
        assert ours == pytest.approx(theirs, rel=BAND)


def test_model_flops_are_counted_as_stated() -> None:
    for method, forwards, guide in (
        ("dynat_inner", 20 + 3 + 1, 3),
        ("dynat", 21 + 3 + 1, 3),
        ("trades", 27, 0),
    ):
        recipe = PARAMS.recipes[method]
        target, teacher, shape = networks("cnn", recipe, CPU)
        work = work_per_image(engine_of(recipe, target, teacher, torch.float32), shape)
        assert work == (forwards + guide) * multiply_adds(target, shape)  # both networks are alike


@pytest.mark.parametrize(("method", "forwards"), [("pgd_at", 25), ("natural", 3)])
def test_model_flops_on_resnet18_are_the_hand_count(method: str, forwards: int) -> None:
    """``pgd_at``: ten inner steps of two, the loss check, a training step of three, the logging forward."""
    study = PARAMS.study["cifar10_resnet18"]
    network = build(num_classes=10, in_channels=3, **study.target.model_dump(exclude_none=True))
    engine = Engine(PARAMS.recipe("cifar10_resnet18", method), network, None)
    assert work_per_image(engine, (3, 32, 32)) == pytest.approx(forwards * 0.556e9, rel=0.01)


@pytest.mark.slow
def test_both_train_digits_to_the_same_robust_accuracy() -> None:
    study = PARAMS.study["digits"]
    train = study.train.model_copy(update={"epochs": 4})
    recipe = rescale(PARAMS.recipes["dynat_inner"], train)
    target, guide, _ = networks("cnn", recipe, CPU)
    published = Published("dynat_inner", recipe, copy.deepcopy(target), copy.deepcopy(guide))
    engine = engine_of(recipe, target, guide, torch.float32)
    training = Training(engine, train, digits(), 0)
    for epoch in range(recipe.schedule.epochs):
        engine.set_epoch(epoch)
        published.optimizer.param_groups[0]["lr"] = engine.optimizer.param_groups[0]["lr"]
        for batch in training.batches(epoch):
            engine.step(batch)
            published.step(batch)
    ours, theirs = (robust_accuracy(network) for network in (engine.target, published.target))
    assert min(ours, theirs) > 0.2  # a guess has 0.1
    assert abs(ours - theirs) < 0.06  # of 400 images: 2.5 standard errors of one accuracy


def digits() -> Splits:
    bunch = load_digits()
    images = torch.tensor(bunch.images * 255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.tensor(bunch.target)
    nothing = (images[:0], labels[:0])
    return Splits(images[400:], labels[400:], *nothing, images[:400], labels[:400], ("",) * 10)


def robust_accuracy(network: nn.Module) -> float:
    """PGD-20 from the images themselves."""
    splits, epsilon = digits(), PARAMS.study["digits"].attack.epsilon
    x, y = splits.test_images.float() / 255, splits.test_labels
    network.eval()
    loss = attacks.cross_entropy(y)
    adversarial = attacks.ascend(network, loss, x, x, epsilon=epsilon, step=epsilon / 4, steps=20)
    return (network(adversarial).argmax(1) == y).float().mean().item()
