"""Stage train: a recipe and a seed -> ``models/<setting>/<method>/<seed>/``.

``target.safetensors`` and ``guide.safetensors`` are the weights of the epoch with the best held-out robust
accuracy, ``*.last.safetensors`` those of the last epoch; ``history.csv`` has a row per epoch, ``trace.csv``
the losses of the first steps.
"""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dynat.errors import DivergedError, UserError
from dynat.runtime import machine
from dynat.runtime.files import sha256
from dynat.runtime.progress import watched
from dynat.runtime.record import RunRecord
from dynat.runtime.signals import graceful_stop
from dynat.runtime.stage import INTERRUPTED, Run, main, memory_for, run_of_arguments
from dynat.runtime.tracking import Tracker

if TYPE_CHECKING:
    from dynat.methods.training import Training
    from dynat.runtime.resume import ResumeStore


def stage() -> int:
    """Train, resume where a stopped run left off, write the model folder at once."""
    run = run_of_arguments(__doc__ or "")
    if run.method in run.params.checkpoint:
        raise UserError(f"method {run.method!r} is a checkpoint: stage import makes it, nothing trains it")
    record = RunRecord("train", run)
    machine.pin(run.study.machine)
    from dynat.methods.setup import set_up
    from dynat.runtime import distributed
    from dynat.runtime.resume import ResumeStore

    batch = f"study.{run.setting}.train.batch"
    with memory_for(batch):
        training, metadata, key = set_up(run)
    with memory_for(batch), ResumeStore(key) as store:
        if state := store.load("state"):
            training.restore(state)
        if distributed.rank() == 0:
            return _train(run, record, store, training, metadata)
        with graceful_stop() as asked:  # a share of each batch, and no output
            done = training.run(lambda _: None, lambda: distributed.anyone(asked()))
        distributed.leave()
        return 0 if done else INTERRUPTED


def _train(
    run: Run, record: RunRecord, store: "ResumeStore", training: "Training", metadata: dict[str, str]
) -> int:
    """What the first or only process does."""
    from dynat.runtime import distributed

    params = {**training.recipe.model_dump(), "seed": run.seed}
    progress = training.progress
    if progress.epoch or progress.losses:
        record.values["resumed_from_epoch"] = progress.epoch
        print(f"resumed in {_place(training)}")
    with Tracker(run.setting, f"{run.method}-{run.seed}", {"stage": "train"}, params) as tracker:
        tracker.begin(store.token, progress.history)

        def after_epoch(row: dict[str, float]) -> None:
            tracker.metrics(row)
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

        label = f"{run.setting} {run.method} epoch"
        with graceful_stop() as asked:
            try:
                done = training.run(
                    after_epoch,
                    _saving(run, store, training, asked),
                    lambda batches, count: watched(batches, f"{label} {progress.epoch + 1}", count),
                )
            except DivergedError as error:
                raise UserError(f"{error}; {store.last_good}") from None
        distributed.leave()
        if not done:
            tracker.finish("KILLED")
            print(f"stopped; goes on in {_place(training)} at the next run", file=sys.stderr)
            return INTERRUPTED
        try:
            training.write(run.path("models"), metadata)
        except UserError:
            store.save("state", training.state())  # it may be longer ago than the disk has been full
            raise
        model = sha256(run.path("models") / "target.safetensors")
        tracker.tags({"model.sha256": model})
        record.values["precision"] = training.precision
        device = training.engine.device
        record.write(device, distributed.size(), store.resumed, model, tracker.finish())
        store.clear()  # the very last: until then a kill costs no epoch
    return 0


def _saving(
    run: Run, store: "ResumeStore", training: "Training", asked: Callable[[], bool]
) -> Callable[[], bool]:
    """What is called after each step: saves the state where that is due, says whether to leave."""
    from dynat.runtime import distributed

    saved = time.monotonic()

    def after_step() -> bool:
        nonlocal saved
        stop = distributed.anyone(asked())
        if stop or time.monotonic() - saved >= 60 * run.params.save_minutes:
            store.save("state", training.state())
            saved = time.monotonic()
        return stop

    return after_step


def _place(training: "Training") -> str:
    progress = training.progress
    return f"epoch {progress.epoch}, after {len(progress.losses)} of {training.steps_per_epoch} steps"


if __name__ == "__main__":
    main(stage)
