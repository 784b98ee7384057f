"""One optimiser step of any recipe: dynamic labels, inner attack, weight perturbation, losses, update.

Shapes: images float32 [B,C,H,W] in [0,1], truth int64 [B]. The guide is forwarded once per step and
batch-norm statistics are brought to what the published code would have (dynat.networks.statistics;
docs/methods.md, sections 3.1 and 13).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynat.config.recipe import Recipe
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


def constants(recipe: Recipe, epoch: int) -> Constants:
    """The constants of a step in ``epoch`` (0-indexed)."""
    schedule, awp, stop = recipe.schedule, recipe.awp, recipe.inner.stop
    rate = schedule.lr * latest(schedule.drops, epoch, 1.0)
    if epoch == 0 and schedule.first_epoch_lr is not None:
        rate = schedule.first_epoch_lr
    weighted = recipe.weights.rule != "uniform" and epoch >= recipe.weights.begin
    perturbed = awp is not None and epoch >= awp.begin
    return Constants(rate, weighted, perturbed, threshold_and_budget(stop, epoch) if stop else (0.0, 0))


class Engine:
    """Target, guide and optimiser of one training, and the recipe that drives them.

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
        self.networks = {"target": target} | ({} if guide is None else {"guide": guide})
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
        self.inner = InnerMaximisation(recipe, target, precision, fold, compiled)
        reads = {"natural": recipe.outer.reads_natural, "adversarial": recipe.outer.reads_adversarial}
        published: list[str] = [name for name, read in reads.items() if read]
        if recipe.batch_norm.target is not None:
            published = list(recipe.batch_norm.target)
        during = [name for name in published if name != "natural_after"]
        self.forwards_after = len(published) - len(during)
        self.order = [name for name, read in reads.items() if read or name in during]  # each only once
        self.momenta = dict(zip(self.order, effective_momenta(during, self.order), strict=True))
        self.updates = {name: during.count(name) for name in self.order}

    def set_epoch(self, epoch: int) -> None:
        """Set the learning rate of ``epoch`` (0-indexed) and remember it for schedules and burn-ins."""
        self.constants = constants(self.recipe, epoch)
        self.optimizer.param_groups[0]["lr"] = self.constants.lr
        self.epoch = epoch

    def step(self, batch: Batch) -> StepLosses:
        """Train on one batch; returns the losses before the update, those of the whole batch."""
        recipe, truth = self.recipe, batch.truth
        guide_logits = self._forward_guide(batch.images)
        dynamic = truth if guide_logits is None else guide_logits.detach().argmax(1)  # Eq. 3
        labels = dynamic if recipe.labels == "guide" else truth
        adversarial, kappa = self.inner(batch, labels, dynamic, self.epoch)
        self.target.train()
        with self._weight_perturbation(batch, adversarial, dynamic, guide_logits):
            logits = Logits(*self._forward_target(batch.images, adversarial), guide_logits)
            against = labels if recipe.weights.against == "label" else truth
            weights = objectives.instance_weights(
                recipe.weights, self.epoch, logits.adversarial, against, kappa, recipe.inner.steps
            )
            smoothing = recipe.smoothing.target
            target_loss = objectives.target_loss(
                recipe.outer, logits, truth, labels, alpha=recipe.alpha, weights=weights, smoothing=smoothing
            )
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

    def _forward_guide(self, images: Tensor) -> Tensor | None:
        if self.guide is None:
            return None
        self.guide.train()  # the published guide is never put in eval mode
        repeats = self.recipe.batch_norm.guide
        (momentum,) = effective_momenta(["natural"] * repeats, ["natural"])
        with statistics(self.guide, momentum, repeats), autocast(self.device, self.precision):
            return self.guide(images)

    def _forward_target(self, images: Tensor, adversarial: Tensor) -> tuple[Tensor | None, Tensor]:
        """Train-mode logits on x (or None) and x'; a forward that only moves statistics keeps no graph."""
        logits: dict[str, Tensor] = {}
        for name in self.order:
            only_statistics = name == "natural" and not self.recipe.outer.reads_natural
            with (
                statistics(self.target, self.momenta[name], self.updates[name]),
                autocast(self.device, self.precision),
                torch.set_grad_enabled(not only_statistics),
            ):
                logits[name] = self.target(images if name == "natural" else adversarial)
        return logits.get("natural"), logits[self.order[-1]]

    def _guide_loss(self, logits: Tensor | None, truth: Tensor) -> tuple[Tensor, Tensor]:
        if logits is None:
            zero = torch.zeros((), device=self.device)
            return zero, zero
        loss = objectives.smoothed_ce(logits, truth, self.recipe.smoothing.guide).mean()  # Eq. 4
        return loss, (logits.detach().argmax(1) == truth).sum()

    def _weight_perturbation(
        self, batch: Batch, adversarial: Tensor, dynamic: Tensor, guide_logits: Tensor | None
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
        loss = objectives.target_loss(objective, Logits(natural, logits, guide), batch.truth, labels)
        parameters = perturbable(self.target)
        return perturbed(parameters, direction(loss, parameters, awp.gamma, len(batch.truth)))
