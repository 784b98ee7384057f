"""What the evaluation stages share: the trained model and its test images, a resumable run, the files."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dynat.config.params import Attack, AutoAttack, Machine
from dynat.data.splits import load
from dynat.errors import UserError
from dynat.evaluation.pieces import Pieces, StoppedError
from dynat.evaluation.results import write_results
from dynat.evaluation.whitebox import Evidence
from dynat.networks.weights import load_network, trained_in
from dynat.runtime import distributed
from dynat.runtime import machine as environment
from dynat.runtime.closure import code_key
from dynat.runtime.files import sha256, write_json
from dynat.runtime.resume import ResumeStore, StopRequested, graceful_stop, resume_key
from dynat.runtime.stage import INTERRUPTED, RunRecord
from dynat.runtime.tracking import Tracker

STOP = "stop"  # the file by which one of several processes tells the others that it must leave


@dataclass(frozen=True)
class Model:
    """The trained networks of a cell, by file, and the test images to attack them with."""

    folder: Path
    device: torch.device
    images: Tensor  # uint8 [n,C,H,W]
    labels: Tensor  # int64 [n]

    def network(self, name: str) -> tuple[nn.Module, int]:
        """The network of ``<name>.safetensors`` in eval mode, and its epoch."""
        return load_network(self.folder / f"{name}.safetensors", self.device)


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found, by checkpoint and attack, and what is written and logged beside it."""

    found: dict[str, dict[str, Evidence]]
    header: dict[str, Any]  # of the metrics: epochs, warnings
    accuracies: dict[str, float]  # percent, for the log
    more: dict[str, Any] = field(default_factory=dict)  # further blocks of the metrics
    sanity: dict[str, Any] | None = None  # content of metrics/sanity, if the evaluation was checked
    notes: tuple[str, ...] = ()  # lines for the log: warnings, failed checks


Work = Callable[[Model, Pieces], Outcome]


def assess(record: RunRecord, spec: Attack | AutoAttack, machine: Machine, work: Work) -> int:
    """Do ``work`` on the model of the record's cell, going on where it was stopped; write ``metrics/<kind>``.

    Under torchrun every process takes its share and the first one writes. Returns the exit status. What
    ``work`` uses must be imported by now: finished pieces are used again with the same code only.
    """
    run, device = record.run, environment.device_of(machine)
    source, folder = Path("data", f"{run.setting}.safetensors"), run.path("models")
    data = load(source, device)
    wanted = max(spec.n) if isinstance(spec, AutoAttack) else spec.n or 0
    if wanted > len(data.test_images):
        key, available = f"study.{run.setting}.{record.kind}.n", len(data.test_images)
        raise UserError(f"{key}: {wanted} is more than the {available} test images that there are")
    model = Model(folder, device, data.test_images, data.test_labels)
    model.network("target")  # now, to say in one line what is missing or damaged
    if distributed.rank() > 0:
        return _follow(model, work)
    key = resume_key(
        {
            record.kind: spec.model_dump_json(exclude={"n", "workers"}),  # more samples keep what is finished
            "data": sha256(source),
            "models": ",".join(sha256(path) for path in sorted(folder.glob("*.safetensors"))),
            "code": code_key(record.kind),
            "package": version("pyautoattack"),
            **environment.fingerprint(device),
        }
    )
    with ResumeStore(key) as store:
        flag = store.folder / STOP
        flag.unlink(missing_ok=True)
        distributed.join(device)  # the others begin when the store is known to be this run's own
        distributed.from_first({"key": store.folder.name})
        with graceful_stop() as stop:
            pieces = Pieces(store.load_piece, store.save_piece, _unheard, partial(_stopped, stop, flag))
            try:
                _lead(record, spec, store, model, pieces, work)
            except StoppedError:
                return INTERRUPTED
    return 0


def _follow(model: Model, work: Work) -> int:
    """What every process but the first does: its share of the pieces, and no output."""
    distributed.join(model.device)
    told = distributed.from_first(None)
    assert told is not None
    store = ResumeStore(told["key"])
    with graceful_stop() as stop:
        stopped = partial(_stopped, stop, store.folder / STOP)
        try:
            work(model, Pieces(store.load_piece, store.save_piece, _unheard, stopped))
        except StoppedError:
            return INTERRUPTED
    distributed.leave()
    return 0


def _stopped(stop: StopRequested, flag: Path) -> bool:
    """Whether this process or, by a file, another one has been asked to leave; tells the others."""
    if distributed.size() == 1:
        return stop.requested
    if stop.requested:
        flag.touch()
    return flag.exists()


def _unheard(piece: str) -> None:
    """Nobody listens."""


def _lead(
    record: RunRecord,
    spec: Attack | AutoAttack,
    store: ResumeStore,
    model: Model,
    pieces: Pieces,
    work: Work,
) -> None:
    """What the first or only process does: its share, the log and the files."""
    run, sha = record.run, sha256(model.folder / "target.safetensors")
    label = f"{run.setting} {run.method} {record.kind}"
    tags = {"stage": record.kind, "model.sha256": sha}
    tracker = Tracker(run.setting, f"{run.method}-{run.seed}", tags=tags, params=spec.model_dump())
    with tracker:
        tracker.begin(store.token)
        try:
            with _told(pieces, label) as told:
                outcome = work(model, told)
        except StoppedError:
            tracker.finish("KILLED", timeout=0)
            print("stopped; the finished pieces are kept for the next run", file=sys.stderr)
            raise
        distributed.leave()
        header = {"epsilon": spec.epsilon, "attack_seed": spec.seed, "model_sha256": sha, **outcome.header}
        header["trained_in"] = trained_in(model.folder / "target.safetensors")
        write_results(run.path(f"metrics/{record.kind}"), header, outcome.found, outcome.more)
        logged = dict(outcome.accuracies)
        if outcome.sanity is not None:
            write_json(run.path("metrics/sanity", ".json"), {**header, **outcome.sanity})
            logged["failed_checks"] = len(outcome.notes)
        tracker.metrics(0, logged)
        record.write(
            **environment.record(model.device),
            processes=distributed.size(),
            resumed=store.resumed,
            model_sha256=sha,
            mlflow_run_id=tracker.finish(),
        )
        store.clear()  # the very last: until then a kill costs no piece
    print("  ".join(f"{name} {value:.2f}" for name, value in outcome.accuracies.items()))
    for note in outcome.notes:
        print(note)


@contextmanager
def _told(pieces: Pieces, label: str) -> Iterator[Pieces]:
    """``pieces`` with a progress bar on a terminal, a line for each new one otherwise."""
    terminal = sys.stderr.isatty()
    with tqdm(desc=label, unit="piece", leave=False, disable=not terminal) as bar:

        def expect(count: int) -> None:
            bar.total = (bar.total or 0) + count

        def notify(piece: str) -> None:
            bar.update()
            bar.set_postfix_str(piece)
            if not terminal:
                print(f"{label}: {piece}", flush=True)

        yield replace(pieces, notify=notify, expect=expect)
