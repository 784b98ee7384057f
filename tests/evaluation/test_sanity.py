"""The sanity suite passes a model that is what it seems, and catches one whose gradients are masked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynat.config.params import Attack
from dynat.evaluation import sanity
from dynat.evaluation.evidence import Evidence
from dynat.evaluation.sanity import check
from dynat.evaluation.whitebox import evaluate

SPEC = Attack(epsilon=0.1, step=0.025, pgd=[10], batch=40)
WHOLE = SPEC.model_copy(update={"pgd": [20, 50, 100]})


class Sides(nn.Module):
    """Class 0 if the left half is brighter, else 1: linear, so a signed gradient step is the best attack."""

    def forward(self, x: Tensor) -> Tensor:
        difference = x[..., :4].mean((1, 2, 3)) - x[..., 4:].mean((1, 2, 3))
        return 20 * torch.stack([difference, -difference], 1)


class Masked(Sides):
    """The same through a coarse rounding of the image, whose gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 16).round() / 16)


class Fickle(Sides):
    """Its answer depends on how many images come at once."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 20 else -super().forward(x)


class Inverted(Sides):
    """A guide that is fooled in the opposite direction."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def images() -> tuple[Tensor, Tensor]:
    """80 noisy images whose halves differ by up to 0.4, and which half is brighter."""
    stream = torch.Generator().manual_seed(0)
    gaps = torch.rand(80, generator=stream) * 0.8 - 0.4
    x = 0.5 + 0.05 * torch.randn(80, 1, 8, 8, generator=stream)
    x[..., :4] += gaps[:, None, None, None] / 2
    x[..., 4:] -= gaps[:, None, None, None] / 2
    x = (x * 255).round().clamp(0, 255).to(torch.uint8)
    return x, (x[..., :4].float().mean((1, 2, 3)) <= x[..., 4:].float().mean((1, 2, 3))).long()


@pytest.fixture(scope="module")
def evidence() -> dict[str, Evidence]:
    """Of every attack that the checks compare, on the honest network."""
    x, y = images()
    return evaluate(Sides().eval(), x, y, WHOLE, ("fgsm", "pgd", "cw"))


def checked(network: nn.Module, guide: nn.Module | None = None) -> dict[str, Any]:
    x, y = images()
    return check(network, guide, x, y, SPEC, evaluate(network.eval(), x, y, SPEC, ("fgsm", "pgd", "cw")))


def failed(network: nn.Module, guide: nn.Module | None = None) -> set[str]:
    checks = checked(network, guide)["checks"]
    return {name for name, each in checks.items() if not each["passed"]}


def test_a_model_whose_gradients_say_the_truth_passes_every_check() -> None:
    found = checked(Sides(), Sides().eval())
    checks, curve = found["checks"], found["epsilon_curve"]
    assert len(checks) == 8
    assert all(each["passed"] for each in checks.values()), checks
    assert (found["n"], found["passed"]) == (80, True)
    x, y = images()
    gap = x[..., :4].double().mean((1, 2, 3)) - x[..., 4:].double().mean((1, 2, 3))
    sign = 1 - 2 * y
    for epsilon, accuracy in curve[:-2]:  # the exact accuracy of a linear model, while nothing is clipped
        expected = 100 * (sign * gap / 255 > 2 * epsilon).double().mean().item()
        assert abs(accuracy - expected) <= 100 * 1.5 / 80
    assert curve[0] == (0.0, 100.0)
    assert curve[-1] == (1.0, 0.0)


def test_masked_gradients_are_caught_by_the_black_box_and_by_the_huge_ball() -> None:
    assert {
        "Square finds no more than PGD and C&W",
        "a ball that holds every image breaks everything",
    } <= failed(Masked())


def test_a_model_that_depends_on_the_batch_is_caught() -> None:
    assert "verdicts do not depend on the batch" in failed(Fickle())


def test_masked_gradients_are_caught_by_transfer_from_a_guide_too() -> None:
    assert "transfer from the guide is weaker than PGD-20" in failed(Masked(), Sides().eval())
    assert not failed(Sides(), Inverted().eval())


def test_what_the_evaluation_has_found_is_taken_and_what_it_lacks_is_found(
    evidence: dict[str, Evidence],
) -> None:
    x, y = (each[:60] for each in images())
    lacking = {name: each for name, each in evidence.items() if not name.startswith("pgd")}
    taken = check(Sides().eval(), None, x, y, WHOLE, evidence)
    assert taken == check(Sides().eval(), None, x, y, SPEC, lacking)


@pytest.mark.parametrize(
    ("verdicts", "caught"),
    [
        ({"pgd20": True}, "PGD-20 is at least as strong as FGSM"),
        ({"pgd50": True, "pgd100": False}, "twice the steps change little"),
        ({"clean": False}, "accuracy does not rise with epsilon"),
    ],
)
def test_verdicts_that_cannot_be_are_caught(
    evidence: dict[str, Evidence], verdicts: dict[str, bool], caught: str
) -> None:
    x, y = images()
    spoilt = {
        name: Evidence(torch.full((80,), robust), y[:0], x[:0].float()) for name, robust in verdicts.items()
    }
    assert not check(Sides().eval(), None, x, y, WHOLE, evidence | spoilt)["checks"][caught]["passed"]


def test_noise_that_breaks_more_than_the_attack_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = torch.zeros(80, dtype=torch.bool)
    monkeypatch.setattr(sanity._Target, "noise", lambda target: nobody)
    assert failed(Sides()) == {"random noise is weaker than PGD-20"}
