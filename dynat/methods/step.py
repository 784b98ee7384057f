"""One optimiser step of any recipe: dynamic labels, inner attack, weight perturbation, losses, update.

Shapes: images float32 [B,C,H,W] in [0,1], truth int64 [B]. The guide is forwarded once per step and
batch-norm statistics are brought to what the published code would have (dynat.networks.statistics;
docs/methods.md, sections 3.1 and 13).
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dynat.config.recipe import Recipe, Schedule
from dynat.methods import objectives
from dynat.methods.batches import Batch
from dynat.methods.inner import InnerMaximisation, autocast, latest, threshold_and_budget
from dynat.methods.objectives import Logits
from dynat.methods.perturbation import direction, perturbable, perturbed
from dynat.networks.statistics import count_on_host, effective_momenta, statistics
from dynat.runtime import distributed


class StepLosses(NamedTuple):
    """Scalars of one step before its update, on the device: reading them would wait for it."""

    target_loss: Tensor
    guide_loss: Tensor
    guide_correct: Tensor  # how many samples of the batch the guide classifies correctly


class Constants(NamedTuple):
    """All in which a step of one epoch may differ from one of another: equal constants, equal steps."""

    lr: float
    weighted: bool  # past the burn-in of choice 4
    perturbed: bool  # past that of choice 5
    stop: tuple[float, int]  # threshold and budget of the early stop
    progress: float = 1.0  # share of the epochs, this one included, where IGDM's term grows with it


def learning_rate(schedule: Schedule, epoch: int, share: float) -> float:
    """The rate of the step with which ``share`` of ``epoch`` (0-indexed) is done, in (0,1].

    Of t = epoch + share epochs of E, as P2333/Bag-of-Tricks-for-AT has them per step: cosine is
    lr (1 + cos(pi t / E)) / 2; linear stays at lr to E/3, falls to lr/10 at 2E/3 and to lr/100 at E; cyclic
    rises from 0 to lr at 2E/5 and falls to 0 at E (docs/methods.md, section 18).
    """
    lr, end, t = schedule.lr, schedule.epochs, epoch + share
    if schedule.shape == "cosine":
        return lr * (1 + math.cos(math.pi * t / end)) / 2
    if schedule.shape == "linear":
        return float(np.interp(t, [0, end / 3, 2 * end / 3, end], [lr, lr, lr / 10, lr / 100]))
    if schedule.shape == "cyclic":
        return float(np.interp(t, [0, 2 * end / 5, end], [0, lr, 0]))
    if epoch == 0 and schedule.first_epoch_lr is not None:
        return schedule.first_epoch_lr
    return schedule.lr * latest(schedule.drops, epoch, 1.0)


def constants(recipe: Recipe, epoch: int, share: float = 1.0) -> Constants:
    """The constants of the step with which ``share`` of ``epoch`` (0-indexed) is done."""
    schedule, awp, stop = recipe.schedule, recipe.awp, recipe.inner.stop
    rate = learning_rate(schedule, epoch, share)
    weighted = recipe.weights.rule != "uniform" and epoch >= recipe.weights.begin
    perturbed = awp is not None and epoch >= awp.begin
    progress = (epoch + 1) / schedule.epochs if recipe.outer.soft.gradient > 0 else 1.0
    stopped = threshold_and_budget(stop, epoch) if stop else (0.0, 0)
    return Constants(rate, weighted, perturbed, stopped, progress)


def mirror(images: Tensor, adversarial: Tensor) -> Tensor:
    """2x - x', the point opposite x', not clamped (IGDM)."""
    return images - (adversarial - images)


class Engine:
    """Target, guide and optimiser of one training, and the recipe that drives them.

    A frozen guide is put in eval mode and is none of the ``networks``, which are those that are trained.
    ``precision`` is the type of the matrix products; for ``fold`` and ``compiled`` see InnerMaximisation.
    Raises ValueError if the recipe lacks its guide.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: nn.Module,
        guide: nn.Module | None,
        precision: torch.dtype = torch.float32,
        fold: bool = False,
        compiled: bool = False,
    ) -> None:
        if recipe.needs_guide and guide is None:
            raise ValueError("the recipe needs a guide")
        self.recipe, self.target, self.guide = recipe, target, guide
        self.precision, self.fold = precision, fold
        self.networks = {"target": target}
        if guide is not None and recipe.guide == "frozen":
            guide.eval().requires_grad_(False)
        elif guide is not None:
            self.networks["guide"] = guide
        self.parameters = [each for network in self.networks.values() for each in network.parameters()]
        self.device = self.parameters[0].device
        self.counters = [counter for each in self.networks.values() for counter in count_on_host(each)]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=recipe.schedule.lr,
            momentum=recipe.schedule.momentum,
            weight_decay=recipe.schedule.weight_decay,
            foreach=self.device.type == "cpu",
            fused=self.device.type == "cuda",
        )
        self.set_epoch(0)
        self.inner = InnerMaximisation(recipe, target, guide, precision, fold, compiled)
        reads = recipe.outer.reads
        published: list[str] = [name for name, read in reads.items() if read]
        if recipe.batch_norm.target is not None:
            published = list(recipe.batch_norm.target)
        during = [name for name in published if name != "natural_after"]
        self.forwards_after = len(published) - len(during)
        self.order = [name for name, read in reads.items() if read or name in during]  # each only once
        self.momenta = dict(zip(self.order, effective_momenta(during, self.order), strict=True))
        self.updates = {name: during.count(name) for name in self.order}

    def set_epoch(self, epoch: int, share: float = 1.0) -> None:
        """Set what depends on ``epoch`` (0-indexed), and on the ``share`` of it that the step completes."""
        self.constants = constants(self.recipe, epoch, share)
        self.optimizer.param_groups[0]["lr"] = self.constants.lr
        self.epoch = epoch

    def step(self, batch: Batch) -> StepLosses:
        """Train on one batch; returns the losses before the update, those of the whole batch."""
        recipe, truth = self.recipe, batch.truth
        guide_logits = self._forward_guide(batch.images)
        dynamic = truth if guide_logits is None else guide_logits.detach().argmax(1)  # Eq. 3
        labels = dynamic if recipe.labels == "guide" else truth
        adversarial, kappa = self.inner(batch, labels, dynamic, guide_logits, self.epoch)
        of_guide = self._frozen_guide(batch.images, adversarial)
        self.target.train()
        with self._weight_perturbation(batch, adversarial, dynamic, guide_logits, of_guide[0]):
            natural, attacked, mirrored = self._forward_target(batch.images, adversarial)
            logits = Logits(natural, attacked, guide_logits, of_guide[0], mirrored, of_guide[1])
            target_loss = self._target_loss(logits, truth, labels, kappa)
            guide_loss, guide_correct = self._guide_loss(guide_logits, truth)
            self.optimizer.zero_grad()
            (target_loss + guide_loss).backward()  # Eq. 6
            distributed.average([p.grad for p in self.parameters if p.grad is not None], len(truth))
            self.optimizer.step()
        for _ in range(self.forwards_after):
            with torch.no_grad(), autocast(self.device, self.precision):
                self.target(batch.images)
        distributed.share_first(buffer for each in self.networks.values() for buffer in each.buffers())
        losses = StepLosses(target_loss.detach(), guide_loss.detach(), distributed.total(guide_correct))
        distributed.average(losses[:2], len(truth))
        return losses

    def _target_loss(self, logits: Logits, truth: Tensor, labels: Tensor, kappa: Tensor | None) -> Tensor:
        """Choices 3 and 4."""
        recipe, rule = self.recipe, self.recipe.weights
        against = labels if rule.against == "label" else truth
        found = objectives.instance_weights(
            rule,
            self.epoch,
            logits.adversarial,
            against,
            kappa,
            recipe.inner.steps,
            logits.guide_adversarial,
        )
        weights, kl_weights = objectives.weights_of_terms(rule, found)
        return objectives.target_loss(
            recipe.outer,
            logits,
            truth,
            labels,
            alpha=recipe.alpha,
            weights=weights,
            kl_weights=kl_weights,
            smoothing=recipe.smoothing.target,
            progress=self.constants.progress,
        )

    def _frozen_guide(self, images: Tensor, adversarial: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """A frozen guide's logits on x' and 2x - x', None where nothing reads them."""
        points = (
            adversarial if self.recipe.reads_guide_at_adversarial else None,
            mirror(images, adversarial) if self.recipe.outer.soft.gradient > 0 else None,
        )
        first, second = (None if each is None else self._forward_guide(each) for each in points)
        return first, second

    def _forward_guide(self, images: Tensor) -> Tensor | None:
        if self.guide is None:
            return None
        if self.recipe.guide == "frozen":
            with torch.no_grad(), autocast(self.device, self.precision):
                return self.guide(images)
        self.guide.train()  # the published guide is never put in eval mode
        repeats = self.recipe.batch_norm.guide
        (momentum,) = effective_momenta(["natural"] * repeats, ["natural"])
        with statistics(self.guide, momentum, repeats), autocast(self.device, self.precision):
            return self.guide(images)

    def _forward_target(
        self, images: Tensor, adversarial: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Train-mode logits on x (or None), x' and 2x - x' (or None).

        A forward that only moves statistics keeps no graph.
        """
        logits: dict[str, Tensor] = {}
        points = {"natural": images, "adversarial": adversarial}
        if "mirrored" in self.order:
            points["mirrored"] = mirror(images, adversarial)
        for name in self.order:
            only_statistics = name != "adversarial" and not self.recipe.outer.reads[name]
            with (
                statistics(self.target, self.momenta[name], self.updates[name]),
                autocast(self.device, self.precision),
                torch.set_grad_enabled(not only_statistics),
            ):
                logits[name] = self.target(points[name])
        return logits.get("natural"), logits[self.order[-1]], logits.get("mirrored")

    def _guide_loss(self, logits: Tensor | None, truth: Tensor) -> tuple[Tensor, Tensor]:
        if logits is None or self.recipe.guide == "frozen":
            zero = torch.zeros((), device=self.device)
            return zero, zero
        loss = objectives.smoothed_ce(logits, truth, self.recipe.smoothing.guide).mean()  # Eq. 4
        return loss, (logits.detach().argmax(1) == truth).sum()

    def _weight_perturbation(
        self,
        batch: Batch,
        adversarial: Tensor,
        dynamic: Tensor,
        guide_logits: Tensor | None,
        guide_adversarial: Tensor | None,
    ) -> AbstractContextManager[None]:
        """Choice 5 in the epochs that have it: the target's weights at w + v (docs/methods.md, 3.2 and 9)."""
        awp = self.recipe.awp
        if awp is None or not self.constants.perturbed:
            return nullcontext()
        objective = awp.objective
        buffers_of_its_own = statistics(self.target, 0.0, 0)  # as the published proxy has them
        with buffers_of_its_own, autocast(self.device, self.precision):
            natural = self.target(batch.images) if objective.reads_natural else None
            logits = natural
            if logits is None or objective.reads_adversarial:
                logits = self.target(adversarial)
        guide = None if guide_logits is None else guide_logits.detach()
        labels = dynamic if awp.labels == "guide" else batch.truth
        read = Logits(natural, logits, guide, guide_adversarial)
        loss = objectives.target_loss(objective, read, batch.truth, labels)
        parameters = perturbable(self.target)
        return perturbed(parameters, direction(loss, parameters, awp.gamma, len(batch.truth)))
