"""Days on a CPU are refused before the first step, for any source of data; minutes are not."""

from pathlib import Path

import pytest
import torch

from dynat.config.params import Params, load
from dynat.errors import UserError
from dynat.methods import estimate
from dynat.methods.estimate import refuse_days_on_cpu, refuse_selected, work_per_image
from dynat.methods.step import Engine
from dynat.networks.architectures import build
from dynat.runtime import machine as environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def params() -> Params:
    return load(ROOT / "params.yaml")


def engine(params: Params, setting: str, method: str) -> Engine:
    study, recipe = params.study[setting], params.recipe(setting, method)
    wanted = [study.target, study.guide] if recipe.needs_guide else [study.target]
    networks = [build(each.name, study.data.classes, 3, **each.options) for each in wanted]
    return Engine(recipe, networks[0], networks[1] if recipe.needs_guide else None)


def refuse(params: Params, setting: str, count: int, **changes: str) -> None:
    machine = params.study[setting].machine.model_copy(update=changes)
    refuse_days_on_cpu(setting, machine, engine(params, setting, "dynat"), (3, 32, 32), count)


def test_a_training_of_days_on_a_cpu_is_refused_with_the_days_and_the_switch_that_insists(
    params: Params,
) -> None:
    with pytest.raises(UserError) as refusal:
        refuse(params, "cifar10_wrn34_10", 49_000)
    (line,) = str(refusal.value).splitlines()
    words = line.split()
    assert float(words[words.index("days;") - 1]) > 5  # 10^16 multiply-adds a day need 10^11 a second
    assert "-S study.cifar10_wrn34_10.machine.device=cpu" in line


def test_the_switch_insists(params: Params) -> None:
    refuse(params, "cifar10_wrn34_10", 49_000, device="cpu")


def test_a_folder_of_images_is_measured_by_what_lies_in_it(params: Params) -> None:
    refuse(params, "cifar10_tiny", 2000)
    with pytest.raises(UserError, match="days"):
        refuse(params, "cifar10_tiny", 500_000_000)


def test_work_of_pgd_at_on_resnet18_is_the_hand_count(params: Params) -> None:
    """Ten inner steps of two, the loss check, a training step of three, the logging forward."""
    pgd_at = engine(params, "cifar10_resnet18", "pgd_at")
    assert work_per_image(pgd_at, (3, 32, 32)) == pytest.approx(25 * 0.556e9, rel=0.01)


def test_work_of_natural_training_is_one_forward_and_its_backward(params: Params) -> None:
    natural = engine(params, "cifar10_resnet18", "natural")
    assert work_per_image(natural, (3, 32, 32)) == pytest.approx(3 * 0.556e9, rel=0.01)


@pytest.fixture
def without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def selected(params: Params, **changes: list[str]) -> Params:
    return params.model_copy(update={"baselines": ["pgd_at"], "variants": [], **changes})


@pytest.mark.usefixtures("without_accelerator")
def test_a_selected_training_of_days_is_refused_before_its_data_is_there(
    params: Params, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cifar10_resnet18: no accelerator here"):
        refuse_selected(selected(params, settings=["digits", "cifar10_resnet18"]), tmp_path)
    refuse_selected(selected(params, settings=["digits", "cifar10_tiny"]), tmp_path)


@pytest.mark.usefixtures("without_accelerator")
def test_a_training_that_is_there_may_be_evaluated_on_a_cpu(params: Params, tmp_path: Path) -> None:
    (tmp_path / "models/cifar10_resnet18/pgd_at/0").mkdir(parents=True)
    refuse_selected(selected(params, settings=["cifar10_resnet18"]), tmp_path)
    with pytest.raises(UserError, match="days"):
        refuse_selected(selected(params, settings=["cifar10_resnet18"], variants=["dynat"]), tmp_path)


@pytest.mark.usefixtures("without_accelerator")
def test_where_the_data_is_there_the_training_itself_refuses(params: Params, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar10_resnet18.safetensors").touch()
    refuse_selected(selected(params, settings=["cifar10_resnet18"]), tmp_path)


@pytest.mark.usefixtures("without_accelerator")
def test_the_estimate_is_of_the_precision_that_the_training_would_have(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(estimate, "measured_peak", lambda precision: asked.append(precision) or 1e18)
    for fast in (False, True):
        monkeypatch.setattr(environment, "fast_bf16", lambda device, fast=fast: fast)
        refuse_selected(selected(params, settings=["cifar10_resnet18"]), tmp_path)
    assert asked == [torch.float32, torch.bfloat16]
