"""What the evaluation stages share: trained networks and test images, a resumable run, its log and files.

Under torchrun every process makes its share of the chunks; the first one alone logs and writes outputs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynat.config.attack import Attack, AutoAttack
from dynat.config.fields import KeyedError
from dynat.data.splits import load
from dynat.errors import UserError
from dynat.evaluation.chunks import Chunks, StoppedError
from dynat.evaluation.evidence import Evidence
from dynat.evaluation.verdicts import Accuracy, accuracy, encode
from dynat.networks.weights import load_network, save_weights, training_of
from dynat.runtime import distributed, machine
from dynat.runtime.closure import code_key
from dynat.runtime.files import digest, sha256, write_json
from dynat.runtime.progress import counted
from dynat.runtime.record import RunRecord
from dynat.runtime.resume import ResumeStore
from dynat.runtime.signals import graceful_stop
from dynat.runtime.stage import INTERRUPTED, Run, memory_for
from dynat.runtime.tracking import Tracker

Spec = TypeVar("Spec", Attack, AutoAttack)


@dataclass(frozen=True)
class TrainedNetworks:
    """The trained networks of a run, by file, and the images to attack them with."""

    folder: Path
    data: Path  # the file of the images
    images: Tensor  # uint8 [n,C,H,W], those of the test set, on the device
    labels: Tensor  # int64 [n]
    train: tuple[Tensor, Tensor]  # the first m <= n training images and their labels, on the CPU
    notes: tuple[str, ...] = ()  # what must stand beside every number from them

    def load(self, name: str) -> tuple[nn.Module, int | None]:
        """The network of ``<name>.safetensors`` in eval mode, and its epoch if it was trained here."""
        return load_network(self.folder / f"{name}.safetensors", self.images.device)


@dataclass(frozen=True)
class Evaluation:
    """What the files of an evaluation hold."""

    evidence: dict[str, dict[str, Evidence]]  # by checkpoint, as in CHECKPOINTS, and attack
    header: dict[str, Any]  # of the metrics: epochs, warnings
    union: dict[str, Accuracy] = field(default_factory=dict)  # AutoAttack's on the first n images, by "n<n>"
    sanity: dict[str, Any] | None = None  # content of metrics/sanity, if the evaluation was checked

    @property
    def warnings(self) -> list[str]:
        """What the user should see at once: the attack's own warnings, checks that failed."""
        checks = self.sanity["checks"] if self.sanity else {}
        failed = [f"FAILED {name}" for name, each in checks.items() if not each["passed"]]
        return [*self.header.get("warnings", []), *failed]


Evaluate = Callable[[TrainedNetworks, Spec, Chunks], Evaluation]


def trained_networks(run: Run, kind: str, device: torch.device) -> TrainedNetworks:
    """The networks of ``run`` and the test images of its setting, on ``device``.

    Raises :class:`UserError` if ``kind``, attack or autoattack, wants more test images than there are, or if
    the target is missing or damaged.
    """
    data = Path("data", f"{run.setting}.safetensors")
    splits = load(data, device)
    try:
        run.study.check_test_images(kind, len(splits.test_images))
    except KeyedError as error:
        raise UserError(f"study.{run.setting}.{error}") from None
    test = splits.test_images, splits.test_labels
    n = len(splits.test_images)  # clones: a view would keep all training images on the device
    train = splits.train_images[:n].cpu().clone(), splits.train_labels[:n].cpu().clone()
    networks = TrainedNetworks(run.path("models"), data, *test, train, splits.notes)
    networks.load("target")  # only to see that it can be
    return networks


def run_evaluation(run: Run, kind: str, spec: Spec, record: RunRecord, evaluate: Evaluate[Spec]) -> int:
    """``evaluate`` the networks of ``run``, from where it was stopped; write ``metrics/<kind>``.

    Returns the exit status. Finished chunks are used again with the same code, data and weights only.
    """
    device = machine.device_of(run.study.machine, f"study.{run.setting}.machine")
    batch = f"study.{run.setting}.{kind}.batch"
    with memory_for(batch):
        networks = trained_networks(run, kind, device)
    key = digest(
        {
            kind: spec.model_dump_json(exclude={"n", "runs", "workers"}),  # chunks are good for any of them
            "data": sha256(networks.data),
            "models": ",".join(sha256(path) for path in sorted(networks.folder.glob("*.safetensors"))),
            "code": code_key(kind),
            "package": version("pyautoattack"),
            **machine.fingerprint(device),
        }
    )
    distributed.join(device)
    with memory_for(batch), ResumeStore(key) as store, graceful_stop() as stop_requested:
        flag = store.folder / "stop"  # makes the other processes leave with the one that was asked to
        if distributed.rank() == 0:
            flag.unlink(missing_ok=True)
        distributed.anyone(False)  # the others begin when the file of an earlier start is gone

        def stopped() -> bool:
            """Whether this process or, by the file, another one has been asked to leave."""
            if stop_requested():
                flag.touch()
            return flag.exists()

        chunks = Chunks(store.load, store.save, stopped, shared=True)
        try:
            if distributed.rank() == 0:
                _evaluate_and_write(run, kind, spec, record, store, networks, chunks, evaluate)
            else:
                evaluate(networks, spec, chunks)
                distributed.leave()
        except StoppedError:
            if distributed.rank() == 0:
                print("stopped; the finished chunks are kept for the next run", file=sys.stderr)
            return INTERRUPTED
    return 0


def _evaluate_and_write(
    run: Run,
    kind: str,
    spec: Spec,
    record: RunRecord,
    store: ResumeStore,
    networks: TrainedNetworks,
    chunks: Chunks,
    evaluate: Evaluate[Spec],
) -> None:
    """What the first or only process does; all calls of tracker, record and progress bar are here."""
    weights = networks.folder / "target.safetensors"
    sha = sha256(weights)
    tags = {"stage": kind, "model.sha256": sha}
    with Tracker(run.setting, f"{run.method}-{run.seed}", tags, spec.model_dump()) as tracker:
        with counted(f"{run.setting} {run.method} {kind}", "chunk") as (count, expect):

            def notify(chunk: str) -> None:
                tracker.begin(store.token)  # not before: no process may be forked after it
                count(chunk)

            evaluation = evaluate(networks, spec, replace(chunks, notify=notify, expect=expect))
        distributed.leave()
        tracker.begin(store.token)
        header = {"epsilon": spec.epsilon, "attack_seed": spec.seed, "model_sha256": sha, **evaluation.header}
        header |= training_of(weights)
        header |= {"data_notes": networks.notes} if networks.notes else {}
        accuracies = write_evaluation(run, kind, header, evaluation)
        tracker.metrics(accuracies)
        record.write(networks.images.device, distributed.size(), store.resumed, sha, tracker.finish())
        store.clear()  # the very last: until then a kill costs no chunk
    summary = "  ".join(f"{name} {value:.2f}" for name, value in accuracies.items())
    print(summary, *evaluation.warnings, sep="\n")


def write_evaluation(run: Run, kind: str, header: dict[str, Any], evaluation: Evaluation) -> dict[str, float]:
    """Write metrics, verdicts and witness to ``metrics/<kind>``, the checks' outcome to ``metrics/sanity``.

    Metrics and checks begin with ``header``. Returns what a reader wants to see first, accuracies in percent
    by name: AutoAttack's union, else those of the checkpoint "best".
    """
    accuracies: dict[str, dict[str, Accuracy]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    witness: dict[str, Tensor] = {}
    for checkpoint, by_attack in evaluation.evidence.items():
        accuracies[checkpoint], verdicts[checkpoint] = {}, {}
        for name, each in by_attack.items():
            robust = each.robust.tolist()
            accuracies[checkpoint][name] = accuracy(robust)
            verdicts[checkpoint][name] = {"n": len(robust), "robust": encode(robust)}
            if not name.startswith("clean"):
                witness[f"{checkpoint}/{name}/indices"] = each.indices
                witness[f"{checkpoint}/{name}/images"] = each.images
    save_weights(run.path(f"metrics/{kind}", ".witness.safetensors"), witness, {})
    write_json(run.path(f"metrics/{kind}", ".verdicts.json"), verdicts)
    write_json(
        run.path(f"metrics/{kind}", ".json"),
        header | accuracies | ({"aa": evaluation.union} if evaluation.union else {}),
    )
    if evaluation.sanity is not None:
        write_json(run.path("metrics/sanity", ".json"), {**header, **evaluation.sanity})
    return {name: each["accuracy"] for name, each in (evaluation.union or accuracies["best"]).items()}
