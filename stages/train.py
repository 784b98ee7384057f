"""Stage train: a recipe and a seed -> ``models/<setting>/<method>/<seed>/``.

``target.safetensors`` and ``guide.safetensors`` are the weights of the epoch with the best held-out robust
accuracy, ``*.last.safetensors`` those of the last epoch; ``history.csv`` has a row per epoch, ``trace.csv``
the losses of the first steps.
"""

import sys
from collections.abc import Iterator
from typing import Any

from dynat.errors import DivergedError, UserError
from dynat.runtime import distributed
from dynat.runtime import machine as environment
from dynat.runtime.files import sha256
from dynat.runtime.progress import watched
from dynat.runtime.record import RunRecord
from dynat.runtime.resume import ResumeStore, graceful_stop
from dynat.runtime.stage import INTERRUPTED, Run, main, run_of_arguments
from dynat.runtime.tracking import Tracker


def stage() -> int:
    """Train, resume where a stopped run left off, write the model folder at once."""
    run = run_of_arguments(__doc__ or "")
    record = RunRecord("train", run)
    environment.pin(run.study.machine)
    if distributed.rank() > 0:
        return _train_along(run)
    tracker = Tracker(
        run.setting,
        f"{run.method}-{run.seed}",
        tags={"stage": "train"},
        params={**run.params.recipe(run.setting, run.method).model_dump(), "seed": run.seed},
    )
    from dynat.methods.setup import set_up

    training, metadata, key = set_up(run)
    with ResumeStore(key) as store, tracker:
        if state := distributed.from_first(store.load()):
            training.restore(state["training"])
            record.values["resumed_from_epoch"] = training.progress.epoch
            print(f"resumed after epoch {training.progress.epoch - 1}")
        tracker.begin(store.token, training.progress.history)

        def after_epoch(row: dict[str, float]) -> None:
            store.save({"training": training.state()})
            tracker.metrics(int(row["epoch"]), {k: v for k, v in row.items() if k != "epoch"})
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

        def watch(batches: Iterator[Any], count: int) -> Iterator[Any]:
            label = f"{run.setting} {run.method} epoch {training.progress.epoch + 1}"
            return watched(batches, label, count)

        with graceful_stop() as stop:
            try:
                done = training.run(after_epoch, lambda: distributed.anyone(stop.requested), watch)
            except DivergedError as error:
                raise UserError(f"{error}; {store.last_good}") from None
        distributed.leave()
        if not done:
            tracker.finish("KILLED")
            print(f"stopped; epoch {training.progress.epoch} starts again at the next run", file=sys.stderr)
            return INTERRUPTED
        training.write(run.path("models"), metadata)
        model = sha256(run.path("models") / "target.safetensors")
        tracker.tags({"model.sha256": model})
        run_id = tracker.finish()
        record.write(
            training.engine.device,
            precision=training.precision,
            processes=distributed.size(),
            resumed=store.resumed,
            model_sha256=model,
            mlflow_run_id=run_id,
        )
        store.clear()  # the very last: until then a kill costs no epoch
    return 0


def _train_along(run: Run) -> int:
    """What every process but the first does: its share of each batch, and no output."""
    from dynat.methods.setup import set_up

    training, _, _ = set_up(run)
    with graceful_stop() as stop:
        if state := distributed.from_first(None):
            training.restore(state["training"])
        done = training.run(lambda _: None, lambda: distributed.anyone(stop.requested))
    distributed.leave()
    return 0 if done else INTERRUPTED


if __name__ == "__main__":
    main(stage)
