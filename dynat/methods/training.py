"""A whole training: epochs, held-out selection, history, resume.

Everything random is drawn from (seed, epoch), so an epoch is repeated exactly without any loader or
generator state, and a training resumed at an epoch's end goes on to the same bits.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynat.config.recipe import Recipe, Train
from dynat.data.splits import Splits, augment, to_unit
from dynat.errors import DivergedError, UserError
from dynat.methods import attacks
from dynat.methods.step import Batch, Engine, Outcome
from dynat.runtime import distributed

PATIENCE = 10  # epochs at the least before a target that learns nothing is given up
PATIENT_SHARE = 0.2  # of all epochs, if that is more
TRACED_STEPS = 100  # first steps whose losses are kept, for replaying them in an audit
Row = dict[str, float]
State = dict[str, Tensor]


@dataclass
class Progress:
    """What a training has reached: all of its resume state beside networks and optimiser."""

    epoch: int = 0  # epochs done
    history: list[Row] = field(default_factory=list)
    trace: list[Row] = field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, State] = field(default_factory=dict)  # "target", "guide" -> weights of the best epoch


class Training:
    """One training of a recipe on a data set, resumable at every epoch's end."""

    def __init__(self, engine: Engine, train: Train, data: Splits, seed: int) -> None:
        if train.batch > len(data.train_images):
            available = len(data.train_images)
            raise UserError(f"train.batch: {train.batch} is larger than the {available} training images")
        side = min(data.train_images.shape[2:])
        if train.pad >= side:
            raise UserError(f"train.pad: {train.pad} must be below {side}, the side of an image")
        last = len(data.train_images) % train.batch or train.batch
        if last < distributed.size():
            raise UserError(
                f"train.batch: with {train.batch} an epoch's last batch has {last} images for "
                f"{distributed.size()} processes; choose another batch size or fewer processes"
            )
        self.engine, self.train, self.data, self.seed = engine, train, data, seed
        self.recipe: Recipe = engine.recipe
        self.progress = Progress()

    @property
    def precision(self) -> str:
        """The type of the matrix products, "fp32" or "bf16"."""
        return "fp32" if self.engine.precision == torch.float32 else "bf16"

    def run(
        self,
        after_epoch: Callable[[Row], None],
        stopped: Callable[[], bool] = lambda: False,
        watch: Callable[[Iterator[Batch], int], Iterator[Batch]] = lambda batches, _: batches,
    ) -> bool:
        """Train to the last epoch; returns False if ``stopped`` asked to leave after a batch.

        ``after_epoch`` gets each history row once the epoch counts as done; ``watch`` may wrap an epoch's
        batches and their number, for a progress bar. Raises :class:`DivergedError` on a loss that is not
        finite, and on a target that has collapsed to chance.
        """
        while self.progress.epoch < self.recipe.schedule.epochs:
            outcomes = []
            self.engine.set_epoch(self.progress.epoch)
            for batch in watch(self.batches(self.progress.epoch), self.batches_per_epoch):
                outcomes.append(self.engine.step(batch))
                if stopped():
                    return False
            row = self._close_epoch(outcomes)
            after_epoch(row)
        return True

    @property
    def batches_per_epoch(self) -> int:
        """Steps of an epoch; the last batch is kept although it may be smaller, as published."""
        return -(-len(self.data.train_images) // self.train.batch)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, a function of (seed, epoch) alone; this process's slice of each."""
        data, train, inner = self.data, self.train, self.recipe.inner
        device = data.train_images.device
        small = generator(torch.device("cpu"), self.seed, epoch, "batches")  # the same on every device
        noise = generator(device, self.seed, epoch, "noise")
        count = len(data.train_images)
        order = torch.randperm(count, generator=small)
        shifts = torch.randint(0, 2 * train.pad + 1, (count, 2), generator=small)
        flips = (torch.rand(count, generator=small) < 0.5) & torch.tensor(train.flip)
        angles = (2 * torch.rand(count, generator=small) - 1) * self.recipe.rotation
        order, shifts, flips, angles = (drawn.to(device) for drawn in (order, shifts, flips, angles))
        for whole in order.split(train.batch):
            part = distributed.part(len(whole))
            index = whole[part]
            images = augment(
                data.train_images[index],
                shifts[index],
                flips[index],
                train.pad,
                self.recipe.padding,
                angles[index] if self.recipe.rotation else None,
            )
            shape = (len(whole), *images.shape[1:])  # drawn for all processes alike
            draw = torch.rand if inner.start == "uniform" else torch.randn
            jitter = None
            if inner.stop is not None and inner.stop.noise > 0:
                jitter = torch.randn((inner.steps, *shape), generator=noise, device=device)
                jitter = jitter[:, part]
            start = draw(shape, generator=noise, device=device)[part]
            yield Batch(to_unit(images), data.train_labels[index], start, jitter)

    def _close_epoch(self, outcomes: list[Outcome]) -> Row:
        progress = self.progress
        target_losses = torch.stack([outcome.target_loss for outcome in outcomes]).tolist()
        guide_losses = torch.stack([outcome.guide_loss for outcome in outcomes]).tolist()
        for step, (target_loss, guide_loss) in enumerate(zip(target_losses, guide_losses, strict=True)):
            if not (abs(target_loss) < float("inf") and abs(guide_loss) < float("inf")):
                raise DivergedError(
                    f"the loss is not finite in epoch {progress.epoch}, step {step} (target {target_loss}, "
                    f"guide {guide_loss}); lower the learning rate"
                )
            if len(progress.trace) < TRACED_STEPS:
                progress.trace.append({"target_loss": target_loss, "guide_loss": guide_loss})
        for name, network in self.networks.items():  # the last step's loss was before its update
            if not all(weights.isfinite().all() for weights in network.parameters()):
                where = f"of the {name} is not finite after epoch {progress.epoch}"
                raise DivergedError(f"a weight {where}; lower the learning rate")
        row = {
            "epoch": progress.epoch,
            "lr": self.engine.optimizer.lr,
            "target_loss": sum(target_losses) / len(outcomes),
            **self._accuracies(),
        }
        if self.engine.guide is not None:
            correct = torch.stack([outcome.guide_correct for outcome in outcomes]).sum().item()
            row["guide_loss"] = sum(guide_losses) / len(outcomes)
            row["guide_train"] = 100 * correct / len(self.data.train_images)
        self._refuse_collapse(row)
        progress.history.append(row)
        if self._is_best(row):
            progress.best_epoch = progress.epoch
            progress.best = {name: _copy(network) for name, network in self.networks.items()}
        progress.epoch += 1
        return row

    def _refuse_collapse(self, row: Row) -> None:
        """Raise if the target has long been no better than a constant prediction on training images.

        Long is a fifth of all epochs, and ten: the first epochs of a sound training may look like that.
        """
        patience = max(PATIENCE, math.ceil(PATIENT_SHARE * self.recipe.schedule.epochs))
        recent = [*self.progress.history, row][-patience:]
        labels = self.data.train_labels[: len(self.data.test_images)]  # those of train_clean
        chance = 100 * int(labels.bincount().max()) / len(labels)
        if len(recent) == patience and all(each["train_clean"] <= chance for each in recent):
            raise DivergedError(
                f"the target has collapsed: {row['train_clean']:.2f} % of training images right after epoch "
                f"{self.progress.epoch}, and for {patience} epochs never more than the {chance:.2f} % of a "
                "constant prediction; lower the learning rate or epsilon"
            )

    def _is_best(self, row: Row) -> bool:
        """Highest held-out robust accuracy, the later epoch on a tie; without held-out data the last.

        A recipe without an adversary is chosen by held-out clean accuracy.
        """
        if not len(self.data.validation_images):
            return True
        criterion = "validation_robust" if self.recipe.inner.steps else "validation_clean"
        return row[criterion] >= max(earlier[criterion] for earlier in self.progress.history)

    def _accuracies(self) -> Row:
        """Accuracies in percent after the epoch, all in eval mode; the test set is only looked at."""
        data, target = self.data, self.engine.target
        count = len(data.test_images)
        row = {
            "train_clean": self._accuracy(target, data.train_images[:count], data.train_labels[:count]),
            "test_clean": self._accuracy(target, data.test_images, data.test_labels),
        }
        if self.engine.guide is not None:
            row["guide_test"] = self._accuracy(self.engine.guide, data.test_images, data.test_labels)
        if len(data.validation_images):
            images, labels = data.validation_images, data.validation_labels
            row["validation_clean"] = self._accuracy(self.engine.target, images, labels)
            row["validation_robust"] = self._accuracy(self.engine.target, images, labels, attacked=True)
        return row

    def _accuracy(self, network: nn.Module, images: Tensor, labels: Tensor, attacked: bool = False) -> float:
        network.eval()
        inner, correct = self.recipe.inner, torch.zeros((), dtype=torch.long, device=images.device)
        noise = generator(images.device, self.seed, 0, "validation")
        parts = zip(images.split(self.train.batch), labels.split(self.train.batch), strict=True)
        for number, (part, truth) in enumerate(parts):
            start = torch.rand(part.shape, generator=noise, device=part.device) if attacked else None
            if number % distributed.size() != distributed.rank():
                continue
            x = to_unit(part)
            if start is not None:  # PGD of the recipe's radius; a fixed start makes epochs comparable
                x = attacks.ascend(
                    network,
                    attacks.cross_entropy(truth),
                    x,
                    attacks.uniform_start(x, inner.epsilon, start),
                    epsilon=inner.epsilon,
                    step=inner.epsilon / 4,
                    steps=self.train.validation_steps,
                )
            with torch.no_grad():
                correct += (network(x).argmax(1) == truth).sum()
        return 100 * distributed.total(correct).item() / len(images)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that this training trains, by name."""
        both = {"target": self.engine.target, "guide": self.engine.guide}
        return {name: network for name, network in both.items() if network is not None}

    def state(self) -> dict[str, Any]:
        """All of the training's state after an epoch: tensors, numbers, strings, lists and dicts only."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizer": self.engine.optimizer.state_dict(),
            "progress": vars(self.progress),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, as :meth:`state` gave it."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        self.engine.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator on ``device`` whose stream is a function of ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _copy(network: nn.Module) -> State:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
