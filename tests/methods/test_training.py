"""A training as a whole: batches, selection, resume, and losses that are not finite."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dynat.config.params import load, parse
from dynat.config.recipe import Recipe
from dynat.config.train import Train
from dynat.data.sources import prepare
from dynat.data.splits import Splits
from dynat.errors import DivergedError, UserError
from dynat.methods.batches import Batch
from dynat.methods.setup import set_up
from dynat.methods.step import Engine, StepLosses
from dynat.methods.training import Training
from dynat.networks.architectures import build
from dynat.networks.weights import save_weights
from dynat.runtime import machine
from dynat.runtime.stage import Run

RECIPES = load().recipes
TRAIN = Train(epochs=3, steps=2, batch=20, pad=1, flip=False, validation_steps=2)


def data(validation: int = 20) -> Splits:
    random = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=random)
        return images, torch.randint(0, 4, (count,), generator=random)

    train, held_out, test = split(50), split(validation), split(20)
    return Splits(*train, *held_out, *test, ("a", "b", "c", "d"))


def training(name: str, seed: int = 0, **changes: Any) -> Training:
    recipe = Recipe(**{**RECIPES[name].model_dump(exclude={"per_study"}), **changes})
    torch.manual_seed(seed)
    target = build("cnn", 4, 1, width=8, depth=1)
    guide = build("cnn", 4, 1, width=8, depth=1) if recipe.needs_guide else None
    return Training(Engine(short(recipe), target, guide), TRAIN, data(), seed)


def short(recipe: Recipe) -> Recipe:
    """The recipe on three epochs and two attack steps."""
    values = recipe.model_dump()
    values["schedule"].update(epochs=3, drops={2: 0.1} if recipe.schedule.shape == "steps" else {})
    values["inner"]["steps"] = min(2, values["inner"]["steps"])
    values["weights"]["begin"] = min(1, values["weights"]["begin"])
    for section in (values["awp"], values["ema"]):
        if section:
            section["begin"] = 1
    if values["inner"]["stop"]:
        values["inner"]["stop"].update(budget={0: 0, 1: 1}, ramp_until=2)
    return Recipe(**values)


def bits(run: Training) -> bytes:
    """All that a training leaves, as bytes."""
    file = io.BytesIO()
    torch.save(run.state(), file)
    return file.getvalue()


LAST = 2  # step of an epoch: it has three


@pytest.mark.parametrize(
    ("name", "epoch", "step"),
    [*((name, 1, 1) for name in sorted(RECIPES)), ("dynat", 1, LAST), ("fat", 2, 0)],
)
def test_a_training_stopped_after_any_step_ends_with_the_bits_of_an_uninterrupted_one(
    name: str, epoch: int, step: int
) -> None:
    straight = training(name)
    assert straight.run(lambda _: None)
    first = training(name)
    steps = iter(range(1, 10))
    assert not first.run(lambda _: None, lambda: next(steps) == 3 * epoch + step + 1)
    resumed = training(name, seed=0)
    resumed.restore(torch.load(io.BytesIO(bits(first)), weights_only=True))
    assert (resumed.progress.epoch, len(resumed.progress.losses)) == (epoch, step + 1)
    assert resumed.run(lambda _: None)
    for mine, other in zip(
        resumed.networks["target"].state_dict().values(),
        straight.networks["target"].state_dict().values(),
        strict=True,
    ):
        assert torch.equal(mine, other)
    assert resumed.progress.history == straight.progress.history
    assert resumed.progress.trace == straight.progress.trace
    assert resumed.progress.best_epoch == straight.progress.best_epoch


def test_only_the_first_monitored_images_are_looked_at_and_the_held_out_ones_all() -> None:
    run = training("dynat")
    run.train = run.train.model_copy(update={"monitored": 4})
    run.run(lambda _: None)
    row, quarter = run.progress.history[-1], 25.0
    assert all(row[name] % quarter == 0 for name in ("train_clean", "test_clean", "guide_test"))
    run.engine.target.eval()
    with torch.no_grad():
        right = run.engine.target(run.data.test_images[:4] / 255).argmax(1) == run.data.test_labels[:4]
    assert row["test_clean"] == 100 * right.float().mean().item()
    assert row["validation_clean"] % 5 == 0  # of twenty


def test_where_the_engine_folds_the_accuracies_are_those_of_the_network_up_to_rounding() -> None:
    plain, folded = training("dynat"), training("dynat")
    folded.engine.fold = True  # the inner attack of both is plain
    for run in (plain, folded):
        run.run(lambda _: None)
    assert folded.folded.keys() == {"target", "guide"}
    for one, other in zip(plain.progress.history, folded.progress.history, strict=True):
        assert one.keys() == other.keys()
        for name in ("train_clean", "test_clean", "guide_test", "validation_clean", "validation_robust"):
            assert abs(one[name] - other[name]) <= 5  # one of twenty


def test_batches_are_a_function_of_seed_and_epoch_and_hold_every_image_once() -> None:
    run = training("dynat")
    again, other = list(run.batches(1)), list(run.batches(2))
    for a, b in zip(run.batches(1), again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.start, b.start)
    assert not torch.equal(again[0].images, other[0].images)
    assert not torch.equal(again[0].start, other[0].start)
    assert [len(batch.truth) for batch in again] == [20, 20, 10]  # the last, smaller batch is kept
    counts = torch.bincount(torch.cat([batch.truth for batch in again]), minlength=4)
    assert torch.equal(counts, torch.bincount(run.data.train_labels, minlength=4))


def test_the_kept_weights_are_those_of_the_best_held_out_epoch() -> None:
    run = training("pgd_at")
    after: list[dict[str, Tensor]] = []
    run.run(lambda _: after.append({k: v.clone() for k, v in run.engine.target.state_dict().items()}))
    scores = [row["validation_robust"] for row in run.progress.history]
    best = max(range(3), key=lambda epoch: (scores[epoch], epoch))
    assert run.progress.best_epoch == best
    assert all(torch.equal(run.progress.best["target"][key], value) for key, value in after[best].items())


def test_a_loss_that_is_not_finite_stops_the_training_in_one_line() -> None:
    run = training("pgd_at")
    with torch.no_grad():
        next(run.engine.target.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite in epoch 0.*learning rate") as error:
        run.run(lambda _: None)
    assert "\n" not in str(error.value)
    assert run.progress.history == []


def test_weights_that_the_last_step_of_an_epoch_ruined_are_never_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = training("pgd_at")
    step, done = run.step, 0

    def ruinous(batch: Batch) -> StepLosses:
        nonlocal done
        outcome = step(batch)
        done += 1
        if done == 3:  # its loss was finite: it is that before the update
            with torch.no_grad():
                next(run.engine.target.parameters()).fill_(float("nan"))
        return outcome

    monkeypatch.setattr(run, "step", ruinous)
    with pytest.raises(UserError, match="a weight of the target is not finite in epoch 0"):
        run.run(lambda _: None)
    assert run.progress.best == {}
    assert run.progress.history == []


def test_a_training_in_another_precision_has_a_resume_state_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    values["study"]["digits"]["machine"] = {"device": "auto"}
    monkeypatch.chdir(tmp_path)
    prepare(parse(values).study["digits"].data, Path("data/digits.safetensors"), "study.digits.data")
    monkeypatch.setattr(machine, "device_of", lambda *spec: torch.device("cpu"))
    keys = {}
    for name in ("fp32", "bf16"):
        values["study"]["digits"]["train"]["precision"] = name
        run, _, keys[name] = set_up(Run("digits", "pgd_at", 0, parse(values)))
        assert run.precision == name
    assert keys["fp32"] != keys["bf16"]


@pytest.mark.parametrize(
    ("guide", "weights", "stage"),
    [
        ("trades", "guide-trades/3", "train_guide"),
        ("pyautoattack_resnet18", "pyautoattack_resnet18/0", "import"),
    ],
)
def test_a_distilled_training_needs_its_guides_weights_and_keeps_none_of_its_own(
    guide: str, weights: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load()
    study = params.study["digits"]
    monkeypatch.chdir(tmp_path)
    prepare(study.data, Path("data/digits.safetensors"), "study.digits.data")
    run = Run("digits", f"rslad-{guide}", 3, params)
    path = Path(f"models/digits/{weights}/target.safetensors")
    with pytest.raises(
        UserError, match=f"{path}: no such file; make the guide's weights: dvc repro {stage}$"
    ):
        set_up(run)
    options = {"num_classes": 10, "in_channels": 1, **study.guide.model_dump(exclude_none=True)}
    keys = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        saved, metadata = build(**options), {"network": json.dumps(options), "epoch": "0"}
        save_weights(path, saved.state_dict(), metadata)
        found, described, key = set_up(run)
        assert found.engine.guide is not None
        for name, value in found.engine.guide.state_dict().items():
            assert torch.equal(value, saved.state_dict()[name])
        keys.add(key)
    assert len(keys) == 2  # another guide, another resume state
    assert [*found.networks] == [*described] == [*found.state()["networks"]] == ["target"]


def test_the_history_of_a_distilled_training_says_nothing_of_a_guide_that_does_not_learn() -> None:
    run = training("rslad")
    run.run(lambda _: None)
    assert {name for name in run.progress.history[-1] if name.startswith("guide")} == set()
    assert [*run.progress.best] == ["target"]


def test_chance_is_that_of_all_training_labels_and_a_perfect_target_has_not_collapsed() -> None:
    run = training("pgd_at")
    labels = torch.tensor(
        [0] * 25 + [1, 2, 3, 1, 2] * 5
    )  # the first twenty, which train_clean sees, are of one
    run.data = run.data._replace(train_labels=labels)
    run.progress.history = [{"train_clean": 100.0}] * 12
    run._refuse_collapse({"train_clean": 100.0})
    run.progress.history = [{"train_clean": 50.0}] * 12
    with pytest.raises(DivergedError, match=r"50\.00 % of a constant prediction"):
        run._refuse_collapse({"train_clean": 50.0})
