"""Signs that an evaluation measures the attack's weakness and not the model's strength, as checks.

From the checklist of Carlini et al. 2019 ("On Evaluating Adversarial Robustness", section 5): attacks that
see more must not find less. A model whose gradients are masked fails several of them. All attacks are those
of the evaluation in eval mode, PGD in its precision and the others in float32; what it has already found is
taken from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from dynat.config.attack import Attack
from dynat.data.splits import to_unit
from dynat.evaluation.evidence import Evidence, predict
from dynat.evaluation.square import Square
from dynat.evaluation.whitebox import evaluate, sample_noise
from dynat.methods import attacks

SAMPLES = 200  # enough for comparisons to within a point; the accuracies themselves come from the attacks
STEPS = 20
QUERIES = 500
TOLERANCE = 0.01  # share of samples by which a comparison may miss: ties of a few samples decide nothing
SETTLED = 0.02  # share of samples that twice the steps may still break
BROKEN = 0.05  # share of samples that may survive a ball that holds every image
RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # in units of epsilon


class Check(TypedDict):
    """Whether a comparison came out as it must, and the accuracies in percent that were compared."""

    passed: bool
    values: dict[str, float]


def check(
    network: nn.Module,
    guide: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    spec: Attack,
    evidence: Mapping[str, Evidence],
) -> dict[str, Any]:
    """The content of ``metrics/sanity``: checks of ``network`` on the first of ``images``, an epsilon curve.

    ``images`` uint8 [n,C,H,W], ``labels`` int64 [n]; ``evidence`` is that of :func:`.whitebox.evaluate` with
    fgsm, pgd and cw on these and perhaps further images. ``guide`` is None for a method without one, which
    has no transfer check. Networks must be in eval mode.
    """
    target = _Target(network, images[:SAMPLES], labels[:SAMPLES], spec)
    robust = {name: each.robust[: len(target.images)] for name, each in evidence.items()}
    if missing := [k for k in (STEPS, 50, 100) if k not in spec.pgd]:
        robust |= target.pgd(pgd=missing)
    clean, white, strongest = robust["clean"], robust[f"pgd{STEPS}"], robust["pgd100"]
    curve = _epsilon_curve(target, _percent(clean), _percent(white))
    accuracies = [accuracy for _, accuracy in curve]
    checks = {
        "PGD-20 is at least as strong as FGSM": _not_above(pgd20=white, fgsm=robust["fgsm"]),
        "twice the steps change little": _not_above(SETTLED, pgd50=robust["pgd50"], pgd100=strongest),
        "random noise is weaker than PGD-20": _not_above(pgd20=white, noise=target.noise()),
        "Square finds no more than PGD and C&W": _not_above(
            white=strongest & robust["cw"], square=clean & target.square()
        ),
        "accuracy does not rise with epsilon": Check(
            passed=all(b <= a + 100 * TOLERANCE for a, b in pairwise(accuracies)),
            values={f"{epsilon:.4g}": accuracy for epsilon, accuracy in curve},
        ),
        "a ball that holds every image breaks everything": Check(
            passed=accuracies[-1] <= 100 * BROKEN, values={"accuracy": accuracies[-1]}
        ),
        "verdicts do not depend on the batch": _same_in_other_batches(target, white),
    }
    if guide is not None:
        transfer = clean & target.transfer(guide)
        checks["transfer from the guide is weaker than PGD-20"] = _not_above(pgd20=white, transfer=transfer)
    passed = all(each["passed"] for each in checks.values())
    return {"n": len(target.images), "passed": passed, "checks": checks, "epsilon_curve": curve}


@dataclass(frozen=True)
class _Target:
    """A network and the images to attack it with; every method returns verdicts, bool [n]."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    spec: Attack

    def pgd(self, **changes: Any) -> dict[str, Tensor]:
        """By PGD as the study has it but for ``changes``, by name."""
        spec = self.spec.model_copy(update=changes)
        found = evaluate(self.network, self.images, self.labels, spec, ("pgd",))
        return {name: evidence.robust for name, evidence in found.items()}

    def noise(self) -> Tensor:
        """Under one draw of uniform noise of the same radius."""
        return self._against(lambda x, y, first: self._start(x, first, self.spec.seed + 1))

    def square(self) -> Tensor:
        """By the Square attack, which sees logits only."""
        epsilon, seed, device = self.spec.epsilon, self.spec.seed, self.images.device
        options = {"n_queries": QUERIES, "resc_schedule": False}
        attack = Square(SquareAttack(self.network, eps=epsilon, seed=seed, device=device, **options))
        return self._against(lambda x, y, first: attacks.project(attack.perturb(x, y), x, epsilon))

    def transfer(self, guide: nn.Module) -> Tensor:
        """On images that PGD-20 crafted on the guide."""
        epsilon, step = self.spec.epsilon, self.spec.step

        def craft(x: Tensor, y: Tensor, first: int) -> Tensor:
            # to the last step: an image that barely fools the guide transfers nothing
            loss, start = attacks.cross_entropy(y), self._start(x, first, self.spec.seed)
            return attacks.ascend(guide, loss, x, start, epsilon=epsilon, step=step, steps=STEPS)

        return self._against(craft)

    def _start(self, x: Tensor, first: int, seed: int) -> Tensor:
        noise = sample_noise(x, seed, first + torch.arange(len(x)))
        return attacks.uniform_start(x, self.spec.epsilon, noise)

    def _against(self, craft: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """On the images that ``craft`` makes of a batch, its labels and its first index."""
        verdicts, batch = [], self.spec.batch
        for first in range(0, len(self.images), batch):
            x, y = to_unit(self.images[first : first + batch]), self.labels[first : first + batch]
            verdicts.append(predict(self.network, craft(x, y, first)) == y)
        return torch.cat(verdicts)


def _epsilon_curve(target: _Target, clean: float, pgd: float) -> list[tuple[float, float]]:
    """Accuracy under PGD-20 at multiples of the study's epsilon and, last, at 1, where any image is near.

    ``clean`` and ``pgd`` are the accuracies at 0 and at epsilon. The step grows in proportion, but stays
    within the ball.
    """
    spec = target.spec
    known = {0.0: clean, spec.epsilon: pgd}
    radii = [*(radius * spec.epsilon for radius in RADII if radius * spec.epsilon < 1), 1.0]
    for epsilon in radii:
        if epsilon not in known:
            step = min(spec.step * epsilon / spec.epsilon, epsilon)
            robust = target.pgd(epsilon=epsilon, step=step, pgd=[STEPS])
            known[epsilon] = _percent(robust[f"pgd{STEPS}"])
    return [(round(epsilon, 6), known[epsilon]) for epsilon in radii]


def _percent(robust: Tensor) -> float:
    return round(100 * robust.float().mean().item(), 4)


def _not_above(tolerance: float = TOLERANCE, **robust: Tensor) -> Check:
    """The first of two verdicts by name leaves no more accuracy than the second, but for ``tolerance``."""
    values = {name: _percent(verdicts) for name, verdicts in robust.items()}
    first, second = values.values()
    return Check(passed=first <= second + 100 * tolerance, values=values)


def _same_in_other_batches(target: _Target, white: Tensor) -> Check:
    """PGD-20 again in batches of another size: rounding may turn a tie, no more."""
    size = max(1, len(target.images) // 3)
    again = target.pgd(pgd=[STEPS], batch=size + (size == target.spec.batch))[f"pgd{STEPS}"]
    differing = _percent(again != white)
    return Check(passed=differing <= 100 * TOLERANCE, values={"differing": differing})
