"""The sanity suite passes a model that is what it seems, and catches one whose gradients are masked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynat.config.attack import Attack
from dynat.evaluation import sanity
from dynat.evaluation.evidence import Evidence
from dynat.evaluation.sanity import check
from dynat.evaluation.whitebox import evaluate, sample_noise

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


def found_as(evidence: dict[str, Evidence], **robust: list[bool]) -> dict[str, Any]:
    """The checks of the honest network on 60 images, with verdicts in the place of some that were found."""
    x, y = (each[:60] for each in images())
    nobody = {name: Evidence(torch.tensor(flags), y[:0], x[:0].float()) for name, flags in robust.items()}
    return check(Sides().eval(), None, x, y, WHOLE, evidence | nobody)["checks"]


def test_a_check_states_the_accuracies_that_it_compared_in_percent(evidence: dict[str, Evidence]) -> None:
    some, fewer = [True] * 20 + [False] * 40, [True] * 19 + [False] * 41
    checks = found_as(evidence, pgd20=fewer, fgsm=some, pgd50=some, pgd100=fewer)
    assert checks["PGD-20 is at least as strong as FGSM"]["values"] == {"pgd20": 31.6667, "fgsm": 33.3333}
    assert checks["twice the steps change little"]["values"] == {"pgd50": 33.3333, "pgd100": 31.6667}
    assert checks["twice the steps change little"][
        "passed"
    ]  # 1.7 % of the samples: what is allowed here alone
    assert not found_as(evidence, pgd20=some, fgsm=fewer)["PGD-20 is at least as strong as FGSM"]["passed"]
    curve = checks["accuracy does not rise with epsilon"]["values"]
    assert [*curve] == ["0", "0.025", "0.05", "0.1", "0.15", "0.2", "0.4", "1"]
    assert curve["0.1"] == 31.6667
    assert checks["a ball that holds every image breaks everything"]["values"] == {"accuracy": curve["1"]}


def test_white_box_attacks_count_together_against_square(evidence: dict[str, Evidence]) -> None:
    everybody, nobody = [True] * 60, [False] * 60
    checks = found_as(evidence, pgd100=everybody, cw=nobody)
    assert checks["Square finds no more than PGD and C&W"]["passed"]
    assert checks["Square finds no more than PGD and C&W"]["values"]["white"] == 0


@pytest.mark.parametrize(("more", "passed"), [(99, True), (100, True), (101, False)])
def test_a_comparison_may_miss_by_one_percent_of_the_samples(more: int, passed: bool) -> None:
    flags = torch.arange(10_000)
    assert sanity._not_above(first=flags < 5000 + more, second=flags < 5000)["passed"] == passed


def of_spec(network: nn.Module, count: int = 80, **changes: Any) -> sanity._Target:
    x, y = images()
    return sanity._Target(network.eval(), x[:count], y[:count], SPEC.model_copy(update=changes))


class Recorded(Sides):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        return super().forward(x)


def test_noise_is_uniform_in_the_ball_and_another_than_the_start_of_the_attacks() -> None:
    network = Recorded()
    of_spec(network, seed=7).noise()
    x = images()[0].float() / 255
    drawn = (2 * sample_noise(x, 8, torch.arange(80)) - 1) * SPEC.epsilon
    torch.testing.assert_close(torch.cat(network.given), (x + drawn).clamp(0, 1))


def test_transfer_starts_where_the_attacks_of_the_evaluation_start() -> None:
    guide = Recorded()
    of_spec(Sides(), seed=7).transfer(guide)
    x = images()[0].float() / 255
    start = (x + (2 * sample_noise(x, 7, torch.arange(80)) - 1) * SPEC.epsilon).clamp(0, 1)
    torch.testing.assert_close(torch.cat([guide.given[0], guide.given[sanity.STEPS]]), start)


def test_square_asks_as_often_as_it_is_said_to() -> None:
    network = Recorded()
    of_spec(network, 4, epsilon=1e-6).square()  # whom nothing breaks
    assert sanity.QUERIES <= len(network.given) <= sanity.QUERIES + 5


@pytest.mark.parametrize(
    ("epsilon", "radii", "steps"),
    [
        (0.5, [0.0, 0.125, 0.25, 0.5, 0.75, 1.0], [0.03125, 0.0625, 0.1875, 0.25]),
        (0.1, [0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.4, 1.0], [0.00625, 0.0125, 0.0375, 0.05, 0.1, 0.25]),
    ],
)
def test_the_curve_has_each_radius_once_and_steps_in_proportion(
    epsilon: float, radii: list[float], steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def pgd(target: sanity._Target, **changes: Any) -> dict[str, Tensor]:
        asked.append(changes)
        return {f"pgd{sanity.STEPS}": torch.tensor([changes["epsilon"] < 0.2, False])}

    monkeypatch.setattr(sanity._Target, "pgd", pgd)
    curve = sanity._epsilon_curve(of_spec(Sides(), epsilon=epsilon, step=epsilon / 4), 100.0, 40.0)
    assert [each for each, _ in curve] == radii
    assert dict(curve)[0.0] == 100.0
    assert dict(curve)[epsilon] == 40.0
    assert all(value == 50 * (each < 0.2) for each, value in curve if each not in (0.0, epsilon))
    assert [each["step"] for each in asked] == pytest.approx(steps)
    assert all(each["pgd"] == [sanity.STEPS] for each in asked)


def test_a_ball_of_one_breaks_what_small_balls_do_not() -> None:
    x, y = images()
    spec = SPEC.model_copy(update={"epsilon": 0.001, "step": 0.00025})
    found = check(
        Sides().eval(), None, x, y, spec, evaluate(Sides().eval(), x, y, spec, ("fgsm", "pgd", "cw"))
    )
    assert found["checks"]["a ball that holds every image breaks everything"] == {
        "passed": True,
        "values": {"accuracy": 0.0},
    }


@pytest.mark.parametrize(("count", "batch", "other"), [(80, 40, 26), (80, 26, 27), (2, 40, 1), (2, 1, 2)])
def test_verdicts_are_compared_with_those_of_another_batch_size(
    count: int, batch: int, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    white = torch.arange(count) % 2 == 0

    def pgd(target: sanity._Target, **changes: Any) -> dict[str, Tensor]:
        asked.append(changes)
        return {f"pgd{sanity.STEPS}": white.logical_xor(torch.arange(count) == 0)}

    monkeypatch.setattr(sanity._Target, "pgd", pgd)
    found = sanity._same_in_other_batches(of_spec(Sides(), count, batch=batch), white)
    assert asked == [{"pgd": [sanity.STEPS], "batch": other}]
    assert found == {"passed": False, "values": {"differing": 100 / count}}
