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
        self,
        recipe: Recipe,
        target: nn.Module,
        guide: nn.Module | None,
        precision: torch.dtype,
        fold: bool,
        compiled: bool,
    ) -> None:
        self.recipe, self.target, self.guide, self.precision = recipe, target, guide, precision
        self.fold = fold and recipe.inner.mode == "eval"  # batch statistics cannot be folded
        self.fold_guide, self.compiled = fold, compiled
        self.folded: Folded | None = None  # since the first batch
        self.folded_guide: Folded | None = None  # since the first batch whose attack moves the guide

    def __call__(
        self, batch: Batch, labels: Tensor, dynamic: Tensor, guide: Tensor | None, epoch: int
    ) -> tuple[Tensor, Tensor | None]:
        """x' [B,C,H,W] and, for GAIRAT, at how many of the iterates each sample is classified correctly.

        ``labels`` int64 [B] are those of choice 1, ``dynamic`` the guide's (Eq. 3); ``guide`` [B,K] are its
        logits on x.
        """
        inner, weights, images = self.recipe.inner, self.recipe.weights, batch.images
        if inner.steps == 0:
            return images, None
        attacked = dynamic if inner.loss == "ce_dynamic" else batch.truth
        forward, along = self._forward(), self._along(batch)
        if along is not None:
            loss: attacks.Loss = attacks.kl_between
        elif inner.loss == "kl":
            with torch.no_grad():
                loss = attacks.kl_from(forward(images))
        elif inner.loss == "kl_guide":
            assert guide is not None
            loss = attacks.kl_from(guide)
        else:
            loss = attacks.cross_entropy(attacked)  # Eq. 2, or Eq. 7
        if inner.start == "uniform":
            start = attacks.uniform_start(images, inner.epsilon, batch.start, inner.clamp)
        else:
            start = attacks.gaussian_start(images, inner.noise, batch.start)
        against = labels if weights.against == "label" else batch.truth
        counter = attacks.CorrectSteps(against) if weights.rule == "gairat" else None
        rules = [rule for rule in (counter, early_stop(inner.stop, attacked, epoch)) if rule is not None]
        moving = (lambda logits: torch.stack([rule(logits) for rule in rules]).all(0)) if rules else None
        jitter = inner.stop.noise * batch.jitter if inner.stop and batch.jitter is not None else None
        adversarial = attacks.ascend(
            forward,
            loss,
            images,
            start,
            epsilon=inner.epsilon,
            step=inner.step,
            steps=inner.steps,
            moving=moving,
            jitter=jitter,
            along=along,
        )
        if inner.mode == "train" and inner.loss_check:  # it moves the statistics
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
            self.folded = self._folded(self.target)
            return self.folded
        return self._as_it_is(self.target)

    def _along(self, batch: Batch) -> attacks.Forward | None:
        """What of the frozen guide moves with the iterate, for the losses whose gradient flows through it."""
        loss = self.recipe.inner.loss
        if loss not in ("kl_guide_moving", "kl_guide_linear"):
            return None
        assert self.guide is not None
        if self.fold_guide and self.folded_guide is None:
            self.folded_guide = self._folded(self.guide)
        forward = self.folded_guide or self._as_it_is(self.guide)
        if loss == "kl_guide_moving":
            return forward
        return attacks.linear_in_truth(forward, batch.images, batch.truth)

    def _folded(self, network: nn.Module) -> Folded:
        """The folded copy of a network in eval mode, compiled where that is asked for."""
        folded = Folded(network, self.precision)
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64  # one limit for all networks of a process
            folded.network.compile(dynamic=False, fullgraph=True)
        return folded

    def _as_it_is(self, network: nn.Module) -> attacks.Forward:
        """The forward of ``network`` in its own mode."""

        def forward(x: Tensor) -> Tensor:
            with autocast(x.device, self.precision):
                return network(x)

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
