"""Schedules, averaging and smoothing of today against their formulas in plain Python; resume."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynat.config.params import load
from dynat.config.recipe import Objective, Recipe, Schedule
from dynat.config.train import Train, rescale
from dynat.data.splits import Splits
from dynat.methods.objectives import Logits, target_loss
from dynat.methods.step import Engine, learning_rate
from dynat.methods.training import MovingAverage, Training
from dynat.networks.architectures import build
from dynat.networks.weights import load_weights

RECIPES = load().recipes
TRAIN = Train(epochs=3, steps=2, batch=20, pad=1, flip=False, validation_steps=2)


def data() -> Splits:
    """Noise, in three batches."""
    draw = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for count in (50, 20, 20):
        tensors.append(torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=draw))
        tensors.append(torch.randint(0, 4, (count,), generator=draw))
    return Splits(*tensors, classes=("a", "b", "c", "d"))


def bits(run: Training) -> bytes:
    """The resume state as bytes."""
    file = io.BytesIO()
    torch.save(run.state(), file)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------- the rate


def plain(shape: str, lr: float, epochs: int, t: float) -> float:
    """The published formulas, piece by piece."""
    if shape == "cosine":
        return 0.5 * lr * (1 + math.cos(t / epochs * math.pi))
    if shape == "cyclic":
        peak = epochs * 2 / 5
        return lr * t / peak if t <= peak else lr * (epochs - t) / (epochs - peak)
    third = epochs / 3
    if t <= third:
        return lr
    if t <= 2 * third:
        return lr + (lr / 10 - lr) * (t - third) / third
    return lr / 10 + (lr / 100 - lr / 10) * (t - 2 * third) / third


@pytest.mark.parametrize("shape", ["cosine", "cyclic", "linear"])
def test_the_rate_of_every_step_is_the_published_formula(shape: str) -> None:
    schedule = Schedule(shape=shape, epochs=7, lr=0.1, weight_decay=5e-4)
    for epoch in range(7):
        for step in range(5):
            share = (step + 1) / 5
            expected = plain(shape, 0.1, 7, epoch + share)
            assert learning_rate(schedule, epoch, share) == pytest.approx(expected, abs=1e-15)


def test_a_step_trains_with_its_own_rate_of_the_shape() -> None:
    run = modern("pgd_at", schedule={"shape": "cosine", "lr": 0.1, "epochs": 3, "weight_decay": 0.0})
    seen: list[float] = []
    run.run(lambda _: None, lambda: bool(seen.append(run.engine.optimizer.param_groups[0]["lr"])))
    assert seen == pytest.approx([plain("cosine", 0.1, 3, (k + 1) / 3) for k in range(9)], abs=1e-15)


def test_drops_beside_a_shape_that_has_none_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"schedule\.drops: not used by shape=cosine; remove it"):
        Recipe(**RECIPES["dynat"].model_dump() | {"schedule": {**SCHEDULE, "drops": {1: 0.1}}})


SCHEDULE: dict[str, Any] = {"shape": "cosine", "lr": 0.05, "epochs": 3, "weight_decay": 5e-4}


# -------------------------------------------------------------------------------------------- moving average


def modern(name: str, **changes: Any) -> Training:
    """A short training with a schedule by step, averaging from the second epoch on, and smoothing."""
    values = RECIPES[name].model_dump(exclude={"per_study"})
    values |= {"schedule": SCHEDULE, "ema": {"tau": 0.6, "begin": 1}, "weights": {}, **changes}
    values["inner"]["steps"] = min(2, values["inner"]["steps"])
    torch.manual_seed(0)
    recipe = Recipe(**values)
    target, guide = (build("cnn", 4, 1, width=8, depth=1) for _ in range(2))
    return Training(Engine(recipe, target, guide if recipe.needs_guide else None), TRAIN, data(), 0)


def test_the_average_is_the_published_recursion_over_the_weights_after_every_step() -> None:
    run = modern("dynat")
    after: list[dict[str, Tensor]] = []

    def keep() -> bool:
        after.append({k: v.detach().double().clone() for k, v in run.engine.target.state_dict().items()})
        return False

    run.run(lambda _: None, keep)
    names = [name for name, _ in run.engine.target.named_parameters()]
    expected = {name: after[3][name] for name in names}  # a copy at the first step of the second epoch
    for done, weights in enumerate(after[4:], start=1):
        rate = min(0.6, (1 + done) / (10 + done))
        expected = {name: rate * expected[name] + (1 - rate) * weights[name] for name in names}
    assert run.average is not None
    found = run.average.module.state_dict()
    for name in names:
        assert torch.allclose(found[name].double(), expected[name], rtol=0, atol=1e-6)
        assert not torch.allclose(found[name].double(), after[-1][name], rtol=0, atol=1e-6)
    for name in found.keys() - {*names}:  # buffers follow the network
        assert torch.equal(found[name], run.engine.target.state_dict()[name])


def test_the_first_average_is_a_copy_and_tau_is_the_most_that_stays() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(network, tau=0.25)
    values = []
    for weight in (1.0, 0.0, 0.0):
        network.weight.data.fill_(weight)
        average.update_parameters(network)
        values.append(average.module.weight.item())
    assert values == pytest.approx([1.0, 2 / 11, 2 / 11 * 0.25])  # 2/11, then 3/12, which is tau


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_training_with_averaging_stopped_after_any_step_ends_with_the_same_bits(step: int) -> None:
    straight, first, resumed = modern("dynat"), modern("dynat"), modern("dynat")
    assert straight.run(lambda _: None)
    steps = iter(range(1, 10))
    assert not first.run(lambda _: None, lambda: next(steps) == step)
    resumed.restore(torch.load(io.BytesIO(bits(first)), weights_only=True))
    assert resumed.run(lambda _: None)
    assert resumed.average is not None
    assert straight.average is not None
    for one, other in ((resumed.average, straight.average), (resumed.engine.target, straight.engine.target)):
        for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)
    assert resumed.progress.history == straight.progress.history
    assert resumed.progress.best_is_average == straight.progress.best_is_average


@pytest.mark.parametrize(
    ("raw", "mean", "epoch", "averaged"),
    [
        ([30.0, 20.0, 10.0], [30.0, 25.0, 5.0], 0, False),  # before it begins there is no average
        ([10.0, 30.0, 20.0], [10.0, 40.0, 20.0], 1, True),
        ([10.0, 20.0, 30.0], [10.0, 5.0, 25.0], 2, False),
        ([10.0, 20.0, 30.0], [10.0, 5.0, 30.0], 2, True),  # on a tie
    ],
)
def test_the_chosen_weights_are_the_better_of_both_on_held_out_images_and_the_file_says_which(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raw: list[float],
    mean: list[float],
    epoch: int,
    averaged: bool,
) -> None:
    run, kept = modern("pgd_at"), list[dict[str, dict[str, Tensor]]]()

    def scored() -> dict[str, float]:
        number = run.progress.epoch
        assert run.average is not None
        both = {"raw": run.engine.target, "average": run.average.module}
        kept.append(
            {which: {k: v.clone() for k, v in each.state_dict().items()} for which, each in both.items()}
        )
        scores = {"validation_robust": raw[number], "ema_validation_robust": mean[number]}
        return {"train_clean": 90.0, **scores}

    monkeypatch.setattr(run, "_accuracies", scored)
    run.run(lambda _: None)
    assert run.progress.best_epoch == epoch
    run.write(tmp_path / "0", {"target": "{}"})
    chosen, said = load_weights(tmp_path / "0/target.safetensors")
    last, of_last = load_weights(tmp_path / "0/target.ema.safetensors")
    expected = kept[epoch]["average" if averaged else "raw"]
    assert all(torch.equal(value, expected[name]) for name, value in chosen.items())
    assert all(torch.equal(value, kept[2]["average"][name]) for name, value in last.items())
    assert not all(torch.equal(value, kept[2]["raw"][name]) for name, value in last.items())
    assert (said.get("weights"), of_last["weights"]) == ("average" if averaged else None, "average")


def test_until_it_begins_the_average_is_the_network_and_no_file_calls_it_one(tmp_path: Path) -> None:
    run = modern("pgd_at", ema={"tau": 0.6, "begin": 2})
    rows: list[dict[str, float]] = []
    run.run(lambda row: bool(rows.append(row)), lambda: run.progress.epoch == 1)
    assert [rows[0]["ema_" + name] for name in ("test_clean", "validation_robust")] == [
        rows[0][name] for name in ("test_clean", "validation_robust")
    ]
    run.write(tmp_path / "0", {"target": "{}"})
    assert not (tmp_path / "0/target.ema.safetensors").exists()
    assert "weights" not in load_weights(tmp_path / "0/target.safetensors")[1]


def test_without_averaging_nothing_is_written_that_was_not_there(tmp_path: Path) -> None:
    run = modern("pgd_at", ema=None)
    run.run(lambda _: None)
    run.write(tmp_path / "0", {"target": "{}"})
    assert not (tmp_path / "0/target.ema.safetensors").exists()
    assert {*load_weights(tmp_path / "0/target.safetensors")[1]} == {"network", "epoch", "precision"}
    assert not any(key.startswith("ema") for row in run.progress.history for key in row)


# -------------------------------------------------------------------------------------- smoothing, the regime


def test_natural_cross_entropy_is_smoothed_as_the_adversarial_one() -> None:
    draw = torch.Generator().manual_seed(0)
    natural, adversarial = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    truth, s = [0, 3, 1], 0.3
    logits = Logits(natural, adversarial, None)
    for objective, read in (
        (Objective(natural_ce=True, adversarial="none", beta=0), natural),
        (Objective(adversarial="ce"), adversarial),
    ):
        expected = 0.0
        for row, label in zip(read.tolist(), truth, strict=True):
            total = math.log(sum(map(math.exp, row)))
            shares = [s / 4 + (1 - s) * (k == label) for k in range(4)]  # PyTorch's convention
            expected += sum(share * (total - z) for share, z in zip(shares, row, strict=True)) / 3
        label = torch.tensor(truth)
        found = target_loss(objective, logits, label, label, smoothing=s)
        assert found.item() == pytest.approx(expected, abs=1e-14)


def test_modern_puts_every_recipe_under_one_schedule_average_and_smoothing() -> None:
    for name, recipe in RECIPES.items():
        found = rescale(recipe, Train(modern=True))
        schedule = found.schedule
        assert (schedule.shape, schedule.epochs, schedule.lr, schedule.weight_decay) == (
            "cosine",
            100,
            0.1,
            5e-4,
        )
        assert (schedule.drops, schedule.first_epoch_lr) == ({}, None)
        assert found.ema is not None
        assert (found.ema.tau, found.ema.begin) == (0.995, 3)
        has_ce = recipe.outer.adversarial == "ce" or bool(recipe.outer.natural_ce)
        assert found.smoothing.target == (0.1 if has_ce else recipe.smoothing.target), name
        assert found.inner == rescale(recipe, Train(epochs=100)).inner


def test_the_shipped_modern_recipe_is_dynat_under_the_regime() -> None:
    assert RECIPES["dynat_modern"] == rescale(RECIPES["dynat"], Train(modern=True))


def test_what_a_setting_says_itself_overrides_the_regime() -> None:
    given = Train(modern=True, epochs=20, lr=0.05, weight_decay=1e-4)
    found = rescale(RECIPES["dynat"], given)
    assert (found.schedule.epochs, found.schedule.lr, found.schedule.weight_decay) == (20, 0.05, 1e-4)
    assert found.schedule.shape == "cosine"
    assert found.ema is not None
    assert found.ema.begin < 20


def test_no_shipped_recipe_but_the_modern_one_has_a_shape_or_an_average_of_its_own() -> None:
    params = load()
    for setting in params.study:
        for name in params.recipes.keys() - {"dynat_modern"}:
            recipe = params.recipe(setting, name)
            assert (recipe.schedule.shape, recipe.ema) == ("steps", None)
