"""Days on a CPU are refused before the first step, for any source of data; minutes are not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynat.data import Splits
from dynat.errors import UserError
from dynat.estimate import multiply_adds_per_image, refuse_days_on_cpu
from dynat.networks import build
from dynat.params import Params, load
from dynat.step import Engine
from dynat.training import Training

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def params() -> Params:
    return load(ROOT / "params.yaml")


def images(count: int) -> Tensor:
    return torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(count, -1, -1, -1)


def engine(params: Params, setting: str, method: str) -> Engine:
    study, recipe = params.study[setting], params.recipe(setting, method)
    wanted = [study.target, study.guide] if recipe.needs_guide else [study.target]
    networks = [build(each.name, study.data.classes, 3, **each.options) for each in wanted]
    return Engine(recipe, networks[0], networks[1] if recipe.needs_guide else None)


def refuse(params: Params, setting: str, count: int, **changes: str) -> None:
    study = params.study[setting]
    nothing = torch.zeros(0, dtype=torch.uint8)
    data = Splits(images(count), *[nothing] * 5, classes=())
    training = Training(engine(params, setting, "dynat"), study.train, data, seed=0)
    refuse_days_on_cpu(setting, study.machine.model_copy(update=changes), training)


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
    pgd_at = engine(params, "cifar10_resnet18", "pgd_at")  # 10 inner steps of two, a training step of three
    assert multiply_adds_per_image(pgd_at, (3, 32, 32)) == pytest.approx(23 * 0.556e9, rel=0.01)
