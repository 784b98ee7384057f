"""The inner maximisation: choice 2 of a recipe, and how the target is forwarded for it.

It differentiates with respect to the input only; the label or natural prediction that it attacks is the same
at every step, so it is computed once (docs/methods.md, section 13).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dynat.config.recipe import Recipe, Stop
from dynat.methods import attacks
from dynat.methods.batches import Batch
from dynat.networks.folded import Folded


class InnerMaximisation:
    """Adversarial images for the batches of a training, against the present weights of ``target``.

    With ``fold`` an eval-mode recipe attacks a folded copy of the target (dynat.networks.folded): faster,
    and the same up to rounding. ``compiled`` is for that copy: at the first forward of each batch size,
    with and without a gradient.
    """

    def __init__(
        self, recipe: Recipe, target: nn.Module, precision: torch.dtype, fold: bool, compiled: bool
    ) -> None:
        self.recipe, self.target, self.precision = recipe, target, precision
        self.fold = fold and recipe.inner.mode == "eval"  # batch statistics cannot be folded
        self.compiled = compiled
        self.folded: Folded | None = None  # since the first batch

    def __call__(
        self, batch: Batch, labels: Tensor, dynamic: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor | None]:
        """x' [B,C,H,W] and, for GAIRAT, at how many of the iterates each sample is classified correctly.

        ``labels`` int64 [B] are those of choice 1, ``dynamic`` the guide's (Eq. 3).
        """
        inner, weights, images = self.recipe.inner, self.recipe.weights, batch.images
        if inner.steps == 0:
            return images, None
        attacked = dynamic if inner.loss == "ce_dynamic" else batch.truth
        forward = self._forward()
        if inner.loss == "kl":
            with torch.no_grad():
                loss = attacks.kl_from(forward(images))
        else:
            loss = attacks.cross_entropy(attacked)  # Eq. 2, or Eq. 7
        if inner.start == "uniform":
            start = attacks.uniform_start(images, inner.epsilon, batch.start)
        else:
            start = attacks.gaussian_start(images, inner.noise, batch.start)
        against = labels if weights.against == "label" else batch.truth
        counter = attacks.CorrectSteps(against) if weights.rule == "gairat" else None
        rules = [rule for rule in (counter, early_stop(inner.stop, attacked, epoch)) if rule is not None]
        moving = (lambda logits: torch.stack([rule(logits) for rule in rules]).all(0)) if rules else None
        jitter = inner.stop.noise * batch.jitter if inner.stop and batch.jitter is not None else None
        ball = {"epsilon": inner.epsilon, "step": inner.step}
        adversarial = attacks.ascend(
            forward, loss, images, start, **ball, steps=inner.steps, moving=moving, jitter=jitter
        )
        if inner.mode == "train":  # the published attack ends with a loss check, which moves the statistics
            with torch.no_grad():
                forward(adversarial)
        return adversarial, counter.kappa if counter else None

    def _forward(self) -> attacks.Forward:
        """The target as it is attacked, in the mode that the recipe asks for."""
        self.target.train(self.recipe.inner.mode == "train")
        if self.folded is not None:
            self.folded.refresh(self.target)
            return self.folded
        if self.fold:
            self.folded = Folded(self.target, self.precision)
            if self.compiled:
                torch._dynamo.config.recompile_limit = 64  # one limit for all networks of a process
                self.folded.network.compile(dynamic=False, fullgraph=True)
            return self.folded

        def forward(x: Tensor) -> Tensor:
            with autocast(x.device, self.precision):
                return self.target(x)

        return forward


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in ``precision``; float32 leaves them in the type of their network."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def early_stop(rule: Stop | None, labels: Tensor, epoch: int) -> attacks.EarlyStop | None:
    """The early stop of ``epoch`` against ``labels`` int64 [B]."""
    return None if rule is None else attacks.EarlyStop(labels, *threshold_and_budget(rule, epoch))


def threshold_and_budget(rule: Stop, epoch: int) -> tuple[float, int]:
    """SAT's threshold is a linear ramp over the epochs, FAT's tau a step function of them.

    Sources: docs/methods.md, sections 7 and 8.
    """
    first, last = rule.threshold
    progress = min(1.0, epoch / rule.ramp_until) if rule.ramp_until else 1.0
    return first + (last - first) * progress, int(latest(rule.budget, epoch, 0))


def latest(table: dict[int, float] | dict[int, int], epoch: int, default: float) -> float:
    """The value of the last entry whose epoch has been reached."""
    reached = [first for first in table if first <= epoch]
    return table[max(reached)] if reached else default
