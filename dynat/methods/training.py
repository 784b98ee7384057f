"""A whole training: epochs, held-out selection, history, resume, the folder that it leaves."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dynat.config.recipe import Precision
from dynat.config.train import Train
from dynat.data.splits import Splits, to_unit
from dynat.errors import DivergedError
from dynat.methods import attacks
from dynat.methods.batches import Batch, batches, generator
from dynat.methods.captured import CapturedSteps
from dynat.methods.step import Engine, StepLosses
from dynat.networks.folded import Folded
from dynat.networks.weights import save_weights
from dynat.runtime import distributed
from dynat.runtime.files import replaced, write_csv

PATIENCE = 10  # epochs at the least before a target that learns nothing is given up
PATIENT_SHARE = 0.2  # of all epochs, if that is more
TRACED_STEPS = 100  # first steps whose losses are kept, for replaying them in an audit
EMA = "ema_"  # before an accuracy of the moving average, in the history
Row = dict[str, float]
State = dict[str, Tensor]


@dataclass
class Progress:
    """What a training has reached: all of its resume state beside networks and optimiser."""

    epoch: int = 0  # epochs done
    losses: list[StepLosses] = field(default_factory=list)  # of the steps done in the epoch after them
    history: list[Row] = field(default_factory=list)
    trace: list[Row] = field(default_factory=list)
    best_epoch: int = -1
    best_is_average: bool = False  # the target's best weights: those of the moving average
    best: dict[str, State] = field(default_factory=dict)  # "target", "guide" -> weights of the best epoch


class MovingAverage(AveragedModel):
    """The moving average W of a network's parameters w; its buffers are the network's.

    The first update copies; at the d-th after it W <- r W + (1 - r) w with r = min(tau, (1 + d) / (10 + d))
    (imrahulr/adversarial_robustness_pytorch; docs/methods.md, section 18). ``module`` is the network of W.
    """

    def __init__(self, network: nn.Module, tau: float) -> None:
        super().__init__(network, multi_avg_fn=self._update)
        self.tau = tau
        self.requires_grad_(False)

    @property
    def begun(self) -> bool:
        """Whether there has been an update."""
        return int(self.n_averaged) > 0

    @torch.no_grad()
    def _update(self, averaged: Sequence[Tensor], present: Sequence[Tensor], _: Tensor | int) -> None:
        done = int(self.n_averaged)
        rate = min(self.tau, (1 + done) / (10 + done))
        for mean, weight in zip(averaged, present, strict=True):
            mean.lerp_(weight, 1 - rate)


def _kept(network: nn.Module) -> State:
    """A copy of the weights in the computer's memory."""
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}


class Training:
    """One training of a recipe on a data set, resumable.

    ``networks`` are those that it trains, "target" and "guide"; ``precision`` is what the engine and the
    process compute in, by name.
    """

    def __init__(
        self, engine: Engine, train: Train, data: Splits, seed: int, precision: Precision = "fp32"
    ) -> None:
        self.engine, self.train, self.data, self.seed = engine, train, data, seed
        self.recipe, self.networks, self.progress = engine.recipe, engine.networks, Progress()
        self.precision = precision
        self.folded: dict[str, Folded] = {}  # what is looked at after an epoch, since the first
        one_gpu = engine.device.type == "cuda" and distributed.size() == 1
        by_epoch = self.recipe.schedule.shape == "steps"  # else a graph would be recorded for every step
        captured = train.engine == "graph" and one_gpu and by_epoch
        self.step = CapturedSteps(engine, train.batch) if captured else engine.step
        self.average = MovingAverage(engine.target, self.recipe.ema.tau) if self.recipe.ema else None

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, a function of (seed, epoch) alone; this process's slice of each."""
        return batches(self.data, self.recipe, self.train, self.seed, epoch)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.data.train_images) / self.train.batch)

    def run(
        self,
        after_epoch: Callable[[Row], None],
        after_step: Callable[[], bool] = lambda: False,
        watch: Callable[[Iterator[Batch], int], Iterator[Batch]] = lambda batches, _: batches,
    ) -> bool:
        """Train to the last epoch; returns False if ``after_step`` asked to leave.

        ``after_epoch`` gets each history row once the epoch counts as done; ``watch`` may wrap the batches
        that an epoch still has and their number, for a progress bar. Raises :class:`DivergedError` on a loss
        that is not finite, and on a target that has collapsed to chance.
        """
        while self.progress.epoch < self.recipe.schedule.epochs:
            done = len(self.progress.losses)
            left = islice(self.batches(self.progress.epoch), done, None)  # drawn in order, so those too
            for batch in watch(left, self.steps_per_epoch - done):
                self.begin(self.progress.epoch, len(self.progress.losses))
                self.progress.losses.append(self.step(batch))
                self.update_average(self.progress.epoch)
                if after_step():
                    return False
            after_epoch(self.close_epoch(self.progress.losses))
        return True

    def update_average(self, epoch: int) -> None:
        """Let the moving average, if there is one by ``epoch``, follow a step."""
        ema = self.recipe.ema
        if self.average is not None and ema is not None and epoch >= ema.begin:
            self.average.update_parameters(self.engine.target)

    def begin(self, epoch: int, number: int) -> None:
        """Make the engine ready for step ``number`` of ``epoch``, both 0-indexed."""
        self.engine.set_epoch(epoch, (number + 1) / self.steps_per_epoch)

    def close_epoch(self, losses: list[StepLosses]) -> Row:
        """Count an epoch as done: its history row, and whether its weights are the best so far."""
        progress = self.progress
        steps = self._read(losses)
        progress.trace += steps[: max(0, TRACED_STEPS - len(progress.trace))]
        row = {
            "epoch": progress.epoch,
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "target_loss": sum(step["target_loss"] for step in steps) / len(steps),
            **self._accuracies(),
        }
        if "guide" in self.networks:
            correct = torch.stack([each.guide_correct for each in losses]).sum().item()
            row["guide_loss"] = sum(step["guide_loss"] for step in steps) / len(steps)
            row["guide_train"] = 100 * correct / len(self.data.train_images)
        self._refuse_collapse(row)
        progress.history.append(row)
        if self._is_best(row):
            progress.best_epoch = progress.epoch
            progress.best = {name: _kept(network) for name, network in self.networks.items()}
            averaged = self.average if self.average is not None and self.average.begun else None
            progress.best_is_average = averaged is not None and self._score(row, EMA) >= self._score(row)
            if averaged is not None and progress.best_is_average:
                progress.best["target"] = _kept(averaged.module)
        progress.epoch += 1
        progress.losses = []
        return row

    def _read(self, losses: list[StepLosses]) -> list[Row]:
        """The losses of an epoch's steps; refuses what is not finite."""
        epoch, names = self.progress.epoch, ("target_loss", "guide_loss")
        columns = [torch.stack([getattr(step, name) for step in losses]).tolist() for name in names if losses]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        for step, row in enumerate(rows):
            if not all(map(math.isfinite, row.values())):
                where = f"in epoch {epoch}, step {step}: {row}"
                raise DivergedError(f"the loss is not finite {where}; lower the learning rate")
        for name, network in self.networks.items():  # the last step's loss was before its update
            if not all(weights.isfinite().all() for weights in network.parameters()):
                where = f"of the {name} is not finite in epoch {epoch}"
                raise DivergedError(f"a weight {where}; lower the learning rate")
        return rows

    def _refuse_collapse(self, row: Row) -> None:
        """Raise if the target was no better than a constant prediction for a fifth of all epochs, and ten.

        The first epochs of a sound training may look like that.
        """
        patience = max(PATIENCE, math.ceil(PATIENT_SHARE * self.recipe.schedule.epochs))
        recent = [*self.progress.history, row][-patience:]
        labels = self.data.train_labels
        chance = 100 * int(labels.bincount().max()) / len(labels)
        if len(recent) == patience and all(each["train_clean"] <= chance for each in recent):
            raise DivergedError(
                f"the target has collapsed: {row['train_clean']:.2f} % of training images right after epoch "
                f"{self.progress.epoch}, and for {patience} epochs never more than the {chance:.2f} % of a "
                "constant prediction; lower the learning rate or epsilon"
            )

    def _is_best(self, row: Row) -> bool:
        """Highest held-out robust accuracy, the later epoch on a tie; without held-out data the last.

        That of the weights or of their moving average, whichever is higher, the average on a tie.
        A recipe without an adversary is chosen by held-out clean accuracy.
        """
        if not len(self.data.validation_images):
            return True
        scores = [max(self._score(each), self._score(each, EMA)) for each in (row, *self.progress.history)]
        return scores[0] == max(scores)

    def _score(self, row: Row, prefix: str = "") -> float:
        """The accuracy that an epoch is chosen by, -1 where there is none of such weights."""
        criterion = "validation_robust" if self.recipe.inner.steps else "validation_clean"
        return row.get(prefix + criterion, -1.0)

    def _accuracies(self) -> Row:
        """Accuracies in percent after the epoch, all in eval mode; the test set is only looked at."""
        data, target = self.data, self._looked_at("target")
        held_out = (data.validation_images, data.validation_labels)
        test = (data.test_images[: self.train.monitored], data.test_labels[: self.train.monitored])
        seen = (data.train_images[: len(test[0])], data.train_labels[: len(test[0])])
        row = {"train_clean": self._accuracy(target, *seen), "test_clean": self._accuracy(target, *test)}
        if "guide" in self.networks:
            row["guide_test"] = self._accuracy(self._looked_at("guide"), *test)
        if len(data.validation_images):
            row["validation_clean"] = self._accuracy(target, *held_out)
            row["validation_robust"] = self._accuracy(target, *held_out, attacked=True)
        if self.average is not None:  # until it begins, the network stands for it
            names = [name for name in ("test_clean", "validation_clean", "validation_robust") if name in row]
            row |= {EMA + name: row[name] for name in names}
            if self.average.begun:
                averaged = self._looked_at("ema")
                row[EMA + "test_clean"] = self._accuracy(averaged, *test)
                if len(data.validation_images):
                    row[EMA + "validation_clean"] = self._accuracy(averaged, *held_out)
                    row[EMA + "validation_robust"] = self._accuracy(averaged, *held_out, attacked=True)
        return row

    def _looked_at(self, name: str) -> nn.Module:
        """What the accuracies of network ``name`` are taken of: its folded copy, where the engine folds.

        "ema" is the target with the moving average of its weights.
        """
        averaged = self.average.module if self.average is not None else self.engine.target
        network = (averaged if name == "ema" else self.networks[name]).eval()
        if not self.engine.fold:
            return network
        if name in self.folded:
            self.folded[name].refresh(network)
        else:
            self.folded[name] = Folded(network, self.engine.precision)
        return self.folded[name]

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
                loss, start = attacks.cross_entropy(truth), attacks.uniform_start(x, epsilon, start)
                steps = self.train.validation_steps
                x = attacks.ascend(network, loss, x, start, epsilon=epsilon, step=epsilon / 4, steps=steps)
            with torch.no_grad():
                correct += (network(x).argmax(1) == truth).sum()
        return 100 * distributed.total(correct).item() / len(images)

    def state(self) -> dict[str, Any]:
        """All of the training's state after a step: tensors, numbers, strings, lists and dicts only.

        Raises :class:`DivergedError` on a loss or a weight that is not finite: it would be one again.
        """
        losses = self.progress.losses
        self._read(losses)
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizer": self.engine.optimizer.state_dict(),
            **({"average": self.average.state_dict()} if self.average is not None else {}),
            "progress": {**vars(self.progress), "losses": []},
            "losses": [torch.stack(each) for each in zip(*losses, strict=True)],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, as :meth:`state` gave it."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        self.engine.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress = Progress(**state["progress"])
        columns = [each.to(self.engine.device).unbind() for each in state["losses"]]
        self.progress.losses = [StepLosses(*each) for each in zip(*columns, strict=True)]

    def write(self, folder: Path, options: Mapping[str, str]) -> None:
        """Write ``folder``, which is there whole or not at all, with each network's ``options`` for build."""
        progress = self.progress
        with replaced(folder) as partial:
            last = progress.epoch - 1
            for name, network in self.networks.items():
                files = {
                    "": (progress.best[name], progress.best_epoch),
                    ".last": (network.state_dict(), last),
                }
                if name == "target" and self.average is not None and self.average.begun:
                    files[".ema"] = self.average.module.state_dict(), last
                for suffix, (weights, epoch) in files.items():
                    metadata = {"network": options[name], "epoch": str(epoch), "precision": self.precision}
                    metadata |= {"regime": "modern"} if self.train.modern else {}
                    if suffix == ".ema" or (name + suffix == "target" and progress.best_is_average):
                        metadata["weights"] = "average"
                    save_weights(partial / f"{name}{suffix}.safetensors", weights, metadata)
            write_csv(partial / "history.csv", progress.history)
            write_csv(partial / "trace.csv", progress.trace)
