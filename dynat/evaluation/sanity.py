"""Signs that an evaluation measures the attack's weakness and not the model's strength, as checks.

From the checklist of Carlini et al. 2019 ("On Evaluating Adversarial Robustness", section 5): attacks that
see more must not find less. A model whose gradients are masked fails several of them. All attacks are those
of the evaluation, in float32 and eval mode; what it has already found is taken from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from dynat.config.params import Attack
from dynat.data.splits import to_unit
from dynat.evaluation.square import Square
from dynat.evaluation.whitebox import Evidence, evaluate, predict, sample_noise
from dynat.methods import attacks

SAMPLES = 200  # enough for comparisons to within a point; the accuracies themselves come from the attacks
STEPS = 20
MOST_STEPS = 50  # of the comparison with twice as many
QUERIES = 500
TOLERANCE = 0.01  # share of samples by which a comparison may miss: ties of a few samples decide nothing
SETTLED = 0.02  # share of samples that twice the steps may still break
BROKEN = 0.05  # share of samples that may survive a ball that holds every image
RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # in units of epsilon


@dataclass
class Check:
    """Whether a comparison came out as it must, and the accuracies in percent that were compared."""

    passed: bool
    values: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Its entry in ``metrics/sanity``."""
        return {"passed": self.passed, "values": self.values}


Curve = list[tuple[float, float]]  # (epsilon, accuracy in percent)


def check(
    network: nn.Module,
    guide: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    spec: Attack,
    found: Mapping[str, Evidence],
) -> tuple[dict[str, Check], Curve]:
    """All checks of ``network`` by name, and its accuracy against epsilon.

    ``images`` uint8 [n,C,H,W], ``labels`` int64 [n]; ``found`` is what :func:`.whitebox.evaluate`
    found with fgsm, pgd and cw on these and perhaps further images. ``guide`` is None for a method without
    one, which has no transfer check. Networks must be in eval mode.
    """
    robust = {name: evidence.robust[: len(images)] for name, evidence in found.items()}
    if missing := [k for k in (STEPS, MOST_STEPS, 2 * MOST_STEPS) if k not in spec.pgd]:
        wanted = spec.model_copy(update={"pgd": missing})
        more = evaluate(network, images, labels, wanted, ("pgd",))
        robust |= {name: evidence.robust for name, evidence in more.items()}
    clean, white, strongest = robust["clean"], robust[f"pgd{STEPS}"], robust[f"pgd{2 * MOST_STEPS}"]
    noisy, square = _noise(network, images, labels, spec), _square(network, images, labels, spec)
    curve = epsilon_curve(network, images, labels, spec, _percent(clean), _percent(white))
    accuracies = [accuracy for _, accuracy in curve]
    checks = {
        "PGD-20 is at least as strong as FGSM": _not_above(white, robust["fgsm"], "pgd20", "fgsm"),
        "twice the steps change little": _settled(robust[f"pgd{MOST_STEPS}"], strongest),
        "random noise is weaker than PGD-20": _not_above(white, noisy, "pgd20", "noise"),
        "Square finds no more than PGD and C&W": _not_above(
            strongest & robust["cw"], clean & square, "white", "square"
        ),
        "accuracy does not rise with epsilon": Check(
            all(b <= a + 100 * TOLERANCE for a, b in pairwise(accuracies)),
            {f"{epsilon:.4g}": accuracy for epsilon, accuracy in curve},
        ),
        "a ball that holds every image breaks everything": Check(
            accuracies[-1] <= 100 * BROKEN, {"accuracy": accuracies[-1]}
        ),
        "verdicts do not depend on the batch": _same_in_other_batches(network, images, labels, spec, white),
    }
    if guide is not None:
        transferred = _transfer(network, guide, images, labels, spec)
        checks["transfer from the guide is weaker than PGD-20"] = _not_above(
            white, clean & transferred, "pgd20", "transfer"
        )
    return checks, curve


def epsilon_curve(
    network: nn.Module, images: Tensor, labels: Tensor, spec: Attack, clean: float, pgd: float
) -> Curve:
    """Accuracy under PGD-20 at multiples of the study's epsilon and, last, at 1, where any image is near.

    ``clean`` and ``pgd`` are the accuracies at 0 and at epsilon. The step grows in proportion, but stays
    within the ball.
    """
    known = {0.0: clean, spec.epsilon: pgd}
    curve = []
    for epsilon in [*(radius * spec.epsilon for radius in RADII if radius * spec.epsilon < 1), 1.0]:
        if epsilon not in known:
            step = min(spec.step * epsilon / spec.epsilon, epsilon)
            here = spec.model_copy(update={"epsilon": epsilon, "step": step, "pgd": [STEPS]})
            known[epsilon] = _percent(evaluate(network, images, labels, here, ("pgd",))[f"pgd{STEPS}"].robust)
        curve.append((round(epsilon, 6), known[epsilon]))
    return curve


def _percent(robust: Tensor) -> float:
    return round(100 * robust.float().mean().item(), 4)


def _not_above(strong: Tensor, weak: Tensor, strong_name: str, weak_name: str) -> Check:
    """The stronger attack leaves no more accuracy than the weaker one."""
    values = {strong_name: _percent(strong), weak_name: _percent(weak)}
    return Check(values[strong_name] <= values[weak_name] + 100 * TOLERANCE, values)


def _settled(before: Tensor, after: Tensor) -> Check:
    values = {f"pgd{MOST_STEPS}": _percent(before), f"pgd{2 * MOST_STEPS}": _percent(after)}
    return Check(abs(_percent(before) - _percent(after)) <= 100 * SETTLED, values)


def _noise(network: nn.Module, images: Tensor, labels: Tensor, spec: Attack) -> Tensor:
    """Verdicts under one draw of uniform noise of the same radius."""
    x = to_unit(images)
    noise = sample_noise(x, spec.seed + 1, torch.arange(len(x)))
    noisy = attacks.uniform_start(x, spec.epsilon, noise)
    return torch.cat([predict(network, part) for part in noisy.split(spec.batch)]) == labels


def _square(network: nn.Module, images: Tensor, labels: Tensor, spec: Attack) -> Tensor:
    """Verdicts under the Square attack, which sees logits only."""
    attack = SquareAttack(
        network,
        p_init=0.8,
        n_queries=QUERIES,
        eps=spec.epsilon,
        norm="Linf",
        n_restarts=1,
        seed=spec.seed,
        verbose=False,
        device=images.device,
        resc_schedule=False,
    )
    verdicts = []
    for part, truth in zip(images.split(spec.batch), labels.split(spec.batch), strict=True):
        x = to_unit(part)
        adversarial = attacks.project(Square(attack).perturb(x, truth), x, spec.epsilon)
        verdicts.append(predict(network, adversarial) == truth)
    return torch.cat(verdicts)


def _transfer(network: nn.Module, guide: nn.Module, images: Tensor, labels: Tensor, spec: Attack) -> Tensor:
    """Verdicts of ``network`` on images that PGD-20 crafted on the guide."""
    verdicts = []
    for first in range(0, len(images), spec.batch):
        x, y = to_unit(images[first : first + spec.batch]), labels[first : first + spec.batch]
        noise = sample_noise(x, spec.seed, first + torch.arange(len(x)))
        start = attacks.uniform_start(x, spec.epsilon, noise)
        # to the last step: an image that barely fools the guide transfers nothing
        loss = attacks.cross_entropy(y)
        adversarial = attacks.ascend(guide, loss, x, start, epsilon=spec.epsilon, step=spec.step, steps=STEPS)
        verdicts.append(predict(network, adversarial) == y)
    return torch.cat(verdicts)


def _same_in_other_batches(
    network: nn.Module, images: Tensor, labels: Tensor, spec: Attack, white: Tensor
) -> Check:
    """PGD-20 again in batches of another size: rounding may turn a tie, no more."""
    size = max(1, len(images) // 3)
    other = spec.model_copy(update={"pgd": [STEPS], "batch": size + (size == spec.batch)})
    again = evaluate(network, images, labels, other, ("pgd",))[f"pgd{STEPS}"].robust
    differing = _percent(again != white)
    return Check(differing <= 100 * TOLERANCE, {"differing": differing})
