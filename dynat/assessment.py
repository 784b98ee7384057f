"""What the evaluation stages share: the trained model and its test images, a resumable run, the files."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dynat import environment, parallel
from dynat.checkpoint import ResumeStore, graceful_stop, resume_key, sha256, write_json
from dynat.data import load
from dynat.evaluation import Evidence
from dynat.params import Attack, AutoAttack, Machine
from dynat.pieces import Pieces, StoppedError
from dynat.results import load_network, write_results
from dynat.stage import INTERRUPTED, RunRecord, code_key
from dynat.tracking import Tracker


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
    notes: tuple[str, ...] = ()  # lines for the log


Work = Callable[[Model, Pieces], Outcome]


def assess(record: RunRecord, spec: Attack | AutoAttack, machine: Machine, work: Work) -> int:
    """Do ``work`` on the model of the record's cell, going on where it was stopped; write ``metrics/<kind>``.

    Under torchrun every process takes its share and the first one writes. Returns the exit status.
    """
    cell, device = record.cell, environment.device_of(machine)
    source, folder = Path("data", f"{cell.setting}.safetensors"), cell.path("models")
    key = resume_key(
        {
            record.kind: spec.model_dump_json(exclude={"n", "workers"}),  # more samples keep what is finished
            "data": sha256(source),
            "models": ",".join(sha256(path) for path in sorted(folder.glob("*.safetensors"))),
            "code": code_key(),
            "package": version("pyautoattack"),
            **environment.fingerprint(device),
        }
    )
    with ResumeStore(key, alone=parallel.rank() == 0) as store, graceful_stop() as stop:
        parallel.join(device)  # the others begin when the store is known to be this run's own
        data = load(source, device)
        model = Model(folder, device, data.test_images, data.test_labels)
        pieces = Pieces(store.load_piece, store.save_piece, lambda _: None, lambda: stop.requested)
        try:
            if parallel.rank() == 0:
                _lead(record, spec, store, model, lambda notify: work(model, replace(pieces, notify=notify)))
            else:
                work(model, pieces)
                parallel.leave()
        except StoppedError:
            return INTERRUPTED
    return 0


def _lead(
    record: RunRecord,
    spec: Attack | AutoAttack,
    store: ResumeStore,
    model: Model,
    work: Callable[[Callable[[str], None]], Outcome],
) -> None:
    """What the first or only process does: its share, the log and the files."""
    cell, terminal = record.cell, sys.stderr.isatty()
    label = f"{cell.setting} {cell.method} {record.kind}"
    sha = sha256(model.folder / "target.safetensors")
    tags = {"stage": record.kind, "model.sha256": sha}
    tracker = Tracker(cell.setting, f"{cell.method}-{cell.seed}", tags=tags, params=spec.model_dump())
    with tracker, tqdm(desc=label, unit="piece", leave=False, disable=not terminal) as bar:
        tracker.begin(store.token)

        def notify(piece: str) -> None:
            bar.update()
            bar.set_postfix_str(piece)
            if not terminal:
                print(f"{label}: {piece}", flush=True)

        try:
            outcome = work(notify)
        except StoppedError:
            tracker.finish("KILLED", timeout=0)
            print("stopped; the finished pieces are kept for the next run", file=sys.stderr)
            raise
        parallel.leave()
        header = {"epsilon": spec.epsilon, "attack_seed": spec.seed, "model_sha256": sha, **outcome.header}
        write_results(cell.path(f"metrics/{record.kind}"), header, outcome.found, outcome.more)
        if outcome.sanity is not None:
            write_json(cell.path("metrics/sanity", ".json"), {**header, **outcome.sanity})
        tracker.metrics(0, outcome.accuracies)
        record.write(
            **environment.record(model.device),
            processes=parallel.size(),
            resumed=store.resumed,
            model_sha256=sha,
            mlflow_run_id=tracker.finish(),
        )
        store.clear()  # the very last: until then a kill costs no piece
    print("  ".join(f"{name} {value:.2f}" for name, value in outcome.accuracies.items()))
    for note in outcome.notes:
        print(note)
