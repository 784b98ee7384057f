"""One optimiser step of any recipe: dynamic labels, inner attack, weight perturbation, losses, update.

Shapes: images float32 [B,C,H,W] in [0,1], truth int64 [B]. The guide is forwarded once per step (its label
is the same at every inner step), the inner loop differentiates with respect to the input only, and
batch-norm statistics are brought to what the published code would have (dynat.networks.statistics).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynat.config.recipe import Recipe, Stop
from dynat.methods import attacks, objectives
from dynat.methods.optimizer import SGD
from dynat.methods.perturbation import direction, perturbable, perturbed
from dynat.networks.frozen import Frozen
from dynat.networks.statistics import effective_momenta, statistics
from dynat.runtime import distributed


class Batch(NamedTuple):
    """A training batch, or a process's slice of it, and its random draws; these are unscaled."""

    images: Tensor  # float32 [B,C,H,W] in [0,1]
    truth: Tensor  # int64 [B]
    start: Tensor  # [B,C,H,W], uniform in [0,1) or standard normal, as the recipe's start asks
    jitter: Tensor | None  # standard normal [steps,B,C,H,W], only for a recipe with inner.stop.noise


class Outcome(NamedTuple):
    """Scalars of one step, on the device: reading them would wait for it."""

    target_loss: Tensor
    guide_loss: Tensor
    guide_correct: Tensor


class Engine:
    """Target, guide and optimiser of one training, and the recipe that drives them.

    ``precision`` is the type of the matrix products. With ``fold`` the inner loop attacks a simplified copy
    of the target (networks.frozen): faster, and the same up to rounding. ``compiled`` is for that copy: at
    the first forward of each batch size, with and without a gradient.
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
        self.recipe, self.target, self.guide, self.precision = recipe, target, guide, precision
        self.fold = fold and recipe.inner.mode == "eval"  # batch statistics cannot be folded
        self.compiled = compiled
        self._frozen: Frozen | None = None
        if recipe.needs_guide and guide is None:
            raise ValueError("the recipe needs a guide")
        self.networks = [target] if guide is None else [target, guide]
        schedule = recipe.schedule
        self.optimizer = SGD(
            [parameter for network in self.networks for parameter in network.parameters()],
            lr=schedule.lr,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
        )
        self.device = next(target.parameters()).device
        self.set_epoch(0)
        self.uses_adversary = recipe.outer.reads_adversarial
        needs_natural = recipe.outer.reads_natural
        forwards: list[str] = list(recipe.batch_norm.target or ())
        if recipe.batch_norm.target is None:
            forwards = ["natural"] * needs_natural + ["adversarial"] * self.uses_adversary
        during = [name for name in forwards if name != "natural_after"]
        self.forwards_after = len(forwards) - len(during)
        forwards_natural = needs_natural or "natural" in during
        self.order = ["natural"] * forwards_natural + ["adversarial"] * self.uses_adversary
        self.momenta = dict(zip(self.order, effective_momenta(during, self.order), strict=True))
        self.updates = {name: during.count(name) for name in self.order}

    def set_epoch(self, epoch: int) -> None:
        """Set the learning rate of ``epoch`` (0-indexed) and remember it for schedules and burn-ins."""
        schedule = self.recipe.schedule
        factor = latest(schedule.drops, epoch, 1.0)
        rate = schedule.lr * factor
        if epoch == 0 and schedule.first_epoch_lr is not None:
            rate = schedule.first_epoch_lr
        self.optimizer.lr = rate
        self.epoch = epoch

    def step(self, batch: Batch) -> Outcome:
        """Train on one batch; returns the losses before the update."""
        truth, recipe = batch.truth, self.recipe
        guide_logits = self._forward_guide(batch.images)
        dynamic = truth if guide_logits is None else guide_logits.detach().argmax(1)  # Eq. 3
        labels = dynamic if recipe.labels == "guide" else truth
        adversarial, kappa = self._attack(batch, labels, dynamic)
        self.target.train()
        with self._weight_perturbation(batch, adversarial, dynamic, guide_logits):
            natural_logits, adversarial_logits = self._forward_target(batch.images, adversarial)
            against = labels if recipe.weights.against == "label" else truth
            weights = objectives.instance_weights(
                recipe.weights,
                self.epoch,
                kappa=kappa,
                steps=recipe.inner.steps,
                adversarial=adversarial_logits,
                labels=against,
            )
            target_loss = objectives.target_loss(
                recipe.outer,
                natural=natural_logits,
                adversarial=adversarial_logits,
                guide=guide_logits,
                truth=truth,
                labels=labels,
                alpha=recipe.alpha,
                weights=weights,
                smoothing=recipe.smoothing.target,
            )
            guide_loss, guide_correct = self._guide_loss(guide_logits, truth)
            self.optimizer.zero_grad()
            (target_loss + guide_loss).backward()  # Eq. 6
            distributed.average(self.optimizer.gradients(), len(truth))
            self.optimizer.step()
        for _ in range(self.forwards_after):
            with torch.no_grad(), self._autocast():
                self.target(batch.images)
        distributed.share_first(buffer for network in self.networks for buffer in network.buffers())
        outcome = Outcome(target_loss.detach(), guide_loss.detach(), distributed.total(guide_correct))
        distributed.average(outcome[:2], len(truth))
        return outcome

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def _forward_guide(self, images: Tensor) -> Tensor | None:
        if self.guide is None:
            return None
        self.guide.train()  # the published guide is never put in eval mode
        repeats = self.recipe.batch_norm.guide
        (momentum,) = effective_momenta(["natural"] * repeats, ["natural"])
        with statistics(self.guide, momentum, repeats), self._autocast():
            return self.guide(images)

    def _guide_loss(self, logits: Tensor | None, truth: Tensor) -> tuple[Tensor, Tensor]:
        if logits is None:
            zero = torch.zeros((), device=self.device)
            return zero, zero
        loss = objectives.smoothed_ce(logits, truth, self.recipe.smoothing.guide).mean()  # Eq. 4
        return loss, (logits.detach().argmax(1) == truth).sum()

    def _forward_target(self, images: Tensor, adversarial: Tensor) -> tuple[Tensor | None, Tensor]:
        """Train-mode logits on x (or None) and x'; a forward that only moves statistics keeps no graph."""
        logits: dict[str, Tensor] = {}
        for name in self.order:
            only_statistics = name == "natural" and not self.recipe.outer.reads_natural
            with (
                statistics(self.target, self.momenta[name], self.updates[name]),
                self._autocast(),
                torch.set_grad_enabled(not only_statistics),
            ):
                logits[name] = self.target(images if name == "natural" else adversarial)
        return logits.get("natural"), logits[self.order[-1]]

    def _attack(self, batch: Batch, labels: Tensor, dynamic: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inner maximisation: x' and, for GAIRAT, the number of correct iterates per sample."""
        inner, images = self.recipe.inner, batch.images
        if inner.steps == 0:
            return images, None
        attacked = self._attacked(images)

        def forward(x: Tensor) -> Tensor:
            with self._autocast():
                return attacked(x)

        if inner.loss == "kl":
            with torch.no_grad():
                loss = attacks.kl_from(forward(images))
        else:
            loss = attacks.cross_entropy(dynamic if inner.loss == "ce_dynamic" else batch.truth)
        if inner.start == "uniform":
            start = attacks.uniform_start(images, inner.epsilon, batch.start)
        else:
            start = attacks.gaussian_start(images, inner.noise, batch.start)
        against = labels if self.recipe.weights.against == "label" else batch.truth
        counter = attacks.CorrectSteps(against) if self.recipe.weights.rule == "gairat" else None
        stop = early_stop(inner.stop, dynamic if inner.loss == "ce_dynamic" else batch.truth, self.epoch)
        watchers = [watcher for watcher in (counter, stop) if watcher is not None]
        jitter = None
        if batch.jitter is not None and inner.stop is not None:
            jitter = inner.stop.noise * batch.jitter
        adversarial = attacks.ascend(
            forward,
            loss,
            images,
            start,
            epsilon=inner.epsilon,
            step=inner.step,
            steps=inner.steps,
            moving=_all_of(watchers) if watchers else None,
            jitter=jitter,
        )
        if inner.mode == "train":  # the published attack ends with a loss check, which moves the statistics
            with torch.no_grad():
                forward(adversarial)
        return adversarial, counter.kappa if counter else None

    def _attacked(self, images: Tensor) -> attacks.Forward:
        """The target as the inner loop forwards it, in the mode that the recipe asks for."""
        self.target.train(self.recipe.inner.mode == "train")
        if not self.fold:
            return self.target
        if self._frozen is None:
            self._frozen = Frozen(self.target, images[:1], self.precision)
            if self.compiled:
                torch._dynamo.reset()  # its limit of compilations is one for all networks of a process
                self._frozen.copy.compile(dynamic=False, fullgraph=True)
        else:
            self._frozen.refresh()
        return self._frozen

    def _weight_perturbation(
        self, batch: Batch, adversarial: Tensor, dynamic: Tensor, guide_logits: Tensor | None
    ) -> AbstractContextManager[None]:
        awp = self.recipe.awp
        if awp is None or self.epoch < awp.begin:
            return nullcontext()
        with statistics(self.target, 0.0, 0), self._autocast():  # the published proxy has its own buffers
            natural = self.target(batch.images) if awp.objective.reads_natural else None
            reads = awp.objective.reads_adversarial
            logits = self.target(adversarial) if reads or natural is None else natural
        loss = objectives.target_loss(
            awp.objective,
            natural=natural,
            adversarial=logits,
            guide=None if guide_logits is None else guide_logits.detach(),
            truth=batch.truth,
            labels=dynamic if awp.labels == "guide" else batch.truth,
        )
        parameters = perturbable(self.target)
        return perturbed(parameters, direction(loss, parameters, awp.gamma, len(batch.truth)))


def _all_of(watchers: list[attacks.CorrectSteps | attacks.EarlyStop]) -> attacks.Moving:
    def moving(logits: Tensor) -> Tensor:
        masks = [watcher(logits) for watcher in watchers]
        return torch.stack(masks).all(0)

    return moving


def early_stop(rule: Stop | None, labels: Tensor, epoch: int) -> attacks.EarlyStop | None:
    """The early stop of ``epoch``: FAT's tau is a step function of it, SAT's threshold a linear ramp."""
    if rule is None:
        return None
    first, last = rule.threshold
    progress = min(1.0, epoch / rule.ramp_until) if rule.ramp_until else 1.0
    return attacks.EarlyStop(labels, first + (last - first) * progress, int(latest(rule.budget, epoch, 0)))


def latest(table: dict[int, float] | dict[int, int], epoch: int, default: float) -> float:
    """The value of the last entry whose epoch has been reached."""
    reached = [first for first in table if first <= epoch]
    return table[max(reached)] if reached else default
