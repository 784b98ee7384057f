"""A whole training: epochs, held-out selection, history, resume, the folder that it leaves."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynat.config.recipe import Recipe, Train
from dynat.data.splits import Splits, to_unit
from dynat.errors import DivergedError, UserError
from dynat.methods import attacks
from dynat.methods.batches import Batch, batches, generator
from dynat.methods.step import Engine, StepLosses
from dynat.networks.weights import save_weights
from dynat.runtime import distributed
from dynat.runtime.files import write_csv

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
    """One training of a recipe on a data set, resumable at every epoch's end to the same bits.

    Raises :class:`UserError`, naming the key of ``train``, where the data are too small for it.
    """

    def __init__(self, engine: Engine, train: Train, data: Splits, seed: int) -> None:
        available, side = len(data.train_images), min(data.train_images.shape[2:])
        if train.batch > available:
            raise UserError(f"train.batch: {train.batch} is larger than the {available} training images")
        if train.pad >= side:
            raise UserError(f"train.pad: {train.pad} must be below {side}, the side of an image")
        last = available % train.batch or train.batch
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

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that this training trains, by name."""
        both = {"target": self.engine.target, "guide": self.engine.guide}
        return {name: network for name, network in both.items() if network is not None}

    @property
    def batches_per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.data.train_images) // self.train.batch)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, a function of (seed, epoch) alone; this process's slice of each."""
        data = self.data
        return batches(data.train_images, data.train_labels, self.recipe, self.train, self.seed, epoch)

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
            losses = []
            self.engine.set_epoch(self.progress.epoch)
            for batch in watch(self.batches(self.progress.epoch), self.batches_per_epoch):
                losses.append(self.engine.step(batch))
                if stopped():
                    return False
            row = self._close_epoch(losses)
            after_epoch(row)
        return True

    def _close_epoch(self, losses: list[StepLosses]) -> Row:
        progress = self.progress
        target_losses, guide_losses = self._read(losses)
        traced = zip(target_losses, guide_losses, strict=True)
        new = [{"target_loss": of_target, "guide_loss": of_guide} for of_target, of_guide in traced]
        progress.trace += new[: max(0, TRACED_STEPS - len(progress.trace))]
        row = {
            "epoch": progress.epoch,
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "target_loss": sum(target_losses) / len(losses),
            **self._accuracies(),
        }
        if self.engine.guide is not None:
            correct = torch.stack([step.guide_correct for step in losses]).sum().item()
            row["guide_loss"] = sum(guide_losses) / len(losses)
            row["guide_train"] = 100 * correct / len(self.data.train_images)
        self._refuse_collapse(row)
        progress.history.append(row)
        if self._is_best(row):
            progress.best_epoch = progress.epoch
            progress.best = {name: _copy(network) for name, network in self.networks.items()}
        progress.epoch += 1
        return row

    def _read(self, losses: list[StepLosses]) -> tuple[list[float], list[float]]:
        """The losses of an epoch's steps, of target and guide; refuses what is not finite."""
        epoch = self.progress.epoch
        target_losses = torch.stack([step.target_loss for step in losses]).tolist()
        guide_losses = torch.stack([step.guide_loss for step in losses]).tolist()
        for step, pair in enumerate(zip(target_losses, guide_losses, strict=True)):
            if not all(map(math.isfinite, pair)):
                where = f"in epoch {epoch}, step {step} (target {pair[0]}, guide {pair[1]})"
                raise DivergedError(f"the loss is not finite {where}; lower the learning rate")
        for name, network in self.networks.items():  # the last step's loss was before its update
            if not all(weights.isfinite().all() for weights in network.parameters()):
                where = f"of the {name} is not finite after epoch {epoch}"
                raise DivergedError(f"a weight {where}; lower the learning rate")
        return target_losses, guide_losses

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
            row["validation_clean"] = self._accuracy(target, images, labels)
            row["validation_robust"] = self._accuracy(target, images, labels, attacked=True)
        return row

    def _accuracy(self, network: nn.Module, images: Tensor, labels: Tensor, attacked: bool = False) -> float:
        network.eval()
        epsilon, correct = self.recipe.inner.epsilon, torch.zeros((), dtype=torch.long, device=images.device)
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
                    attacks.uniform_start(x, epsilon, start),
                    epsilon=epsilon,
                    step=epsilon / 4,
                    steps=self.train.validation_steps,
                )
            with torch.no_grad():
                correct += (network(x).argmax(1) == truth).sum()
        return 100 * distributed.total(correct).item() / len(images)

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

    def write(self, folder: Path, built: Mapping[str, str]) -> None:
        """Write the finished training as ``folder``, which is there whole or not at all.

        ``built`` tells for each network how :func:`dynat.networks.architectures.build` builds it, in JSON.
        """
        progress = self.progress
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name, network in self.networks.items():
            for suffix, weights, epoch in (
                ("", progress.best[name], progress.best_epoch),
                (".last", network.state_dict(), progress.epoch - 1),
            ):
                metadata = {"network": built[name], "epoch": str(epoch), "precision": self.precision}
                save_weights(partial / f"{name}{suffix}.safetensors", weights, metadata)
        write_csv(partial / "history.csv", progress.history)
        write_csv(partial / "trace.csv", progress.trace)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _copy(network: nn.Module) -> State:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
