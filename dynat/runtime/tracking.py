"""MLflow runs, logged by MLflow's own client on a thread of the stage, which does not wait for it.

A store that fails costs one warning, and every later row tries it again. What it lacks when the stage ends
is logged by the next start of the same training, from its history, or by ``python -m dynat.runtime.tracking``
from the file that the stage leaves. No output's byte depends on this module.
"""

import gc
import json
import os
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from dynat.errors import UserError
from dynat.runtime.files import root, write_json
from dynat.runtime.stage import main

DEFAULTS = {  # MLflow's own report home, print, and ask a dead server for minutes
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
DVC_TAGS = {
    "dvc.stage": "DVC_STAGE",
    "dvc.exp_name": "DVC_EXP_NAME",
    "dvc.baseline_rev": "DVC_EXP_BASELINE_REV",
}
TOKEN_TAG = "dynat.token"
COMMAND = "python -m dynat.runtime.tracking"
LOCKED_S = 10.0  # how long the thread waits for a locked SQLite store,
PATIENCE_S = 30.0  # and the end of a stage for the thread


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else the SQLite file in the user's repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def unlogged() -> Path:
    """The folder in which stages leave what their store did not take."""
    return root() / ".dvc" / "tmp" / "dynat" / "mlflow"


class Tracker:
    """One MLflow run. No method raises, one warning is all it prints, and only :meth:`finish` waits.

    ``params`` may be nested; keys are joined by dots. In a ``with``, an error ends the run as FAILED. A
    process that is killed leaves it RUNNING.
    """

    def __init__(
        self, experiment: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        dvc = {tag: os.environ[name] for tag, name in DVC_TAGS.items() if name in os.environ}
        self._run: dict[str, Any] = {
            "experiment": experiment,
            "run_name": run_name,
            "params": dict(_flat(params)),
            "tags": {**dvc, **tags},
            "rows": [],
            "status": "RUNNING",
        }
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._log, name="mlflow", daemon=True)
        self._run_id: str | None = None
        self._failing = self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def begin(self, token: str, history: Iterable[Mapping[str, float]] = ()) -> None:
        """Open the run, or go on with the one begun with the same ``token`` (of the resume state).

        ``history`` are the rows so far; those that the store lacks are logged. A second call does nothing. No
        process may be forked after it: the thread imports MLflow, whose locks the fork would find held for
        ever.
        """
        if self._thread.ident is None:
            self._run["token"] = token
            for row in history:
                self.metrics(row)
            self._thread.start()

    def metrics(self, row: Mapping[str, float]) -> None:
        """Log ``row`` at its "epoch", else at step 0; in a continued run what is there is left alone."""
        self._run["rows"].append({"time": time.time_ns() // 1_000_000, "values": dict(row)})
        self._news.set()

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run when it ends."""
        self._run["tags"] = {**self._run["tags"], **values}

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the run as FINISHED, FAILED or KILLED; its id, or None if the store does not have it all."""
        if not self._thread.is_alive():
            return self._run_id
        self._run["status"] = status
        self._news.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._warn("does not answer")
        file = unlogged() / f"{self._run['token']}.json"
        with suppress(OSError, UserError):
            if self._failing:
                write_json(file, self._run)
            else:
                file.unlink(missing_ok=True)  # of an earlier start
        return None if self._failing else self._run_id

    def _log(self) -> None:
        """The thread: log what is new, until the end of the run has been tried."""
        stored, ended = None, False
        while not ended:
            self._news.wait()
            self._news.clear()
            ended = self._run["status"] != "RUNNING"
            try:
                stored = stored or _StoredRun(self._run)
                stored.update()
                self._run_id, self._failing = stored.id, False
            except Exception as error:
                stored = None
                self._warn(str(error))

    def _warn(self, reason: str) -> None:
        self._failing = True
        if not self._warned:
            self._warned = True
            line = f"MLflow at {tracking_uri()}: {reason}; the stage goes on, {COMMAND} logs the rest later"
            print(f"warning: {_legible(line)}", file=sys.stderr)


class _StoredRun:
    """A run in the store, new or continued. All of it may be done twice: that changes nothing."""

    def __init__(self, run: dict[str, Any]) -> None:
        client, experiment = _open_store(run["experiment"])
        from mlflow.entities import Param

        token = run["token"]
        found = client.search_runs([experiment], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        else:
            tags = {TOKEN_TAG: token, **run["tags"]}
            found = [client.create_run(experiment, tags=tags, run_name=run["run_name"])]
        self._client, self._run, self._logged, self.id = client, run, 0, found[0].info.run_id
        data = found[0].data
        params = [Param(key, text) for key, text in run["params"].items() if key not in data.params]
        client.log_batch(self.id, params=params)
        points = {key: client.get_metric_history(self.id, key) for key in data.metrics}
        self._before = {(key, each.step) for key, history in points.items() for each in history}

    def update(self) -> None:
        """Log the rows that are new, and the end of the run."""
        from mlflow.entities import Metric, RunTag

        for row in self._run["rows"][self._logged :]:
            step = int(row["values"].get("epoch", 0))
            new = {key: value for key, value in row["values"].items() if (key, step) not in self._before}
            metrics = [Metric(key, value, row["time"], step) for key, value in new.items() if key != "epoch"]
            self._client.log_batch(self.id, metrics)
            self._logged += 1
        if self._run["status"] != "RUNNING":
            tags = [RunTag(key, value) for key, value in self._run["tags"].items()]
            self._client.log_batch(self.id, tags=tags)
            self._client.set_terminated(self.id, self._run["status"])


def _open_store(experiment: str) -> tuple[Any, str]:
    """An ``MlflowClient`` and the id of ``experiment``; of a SQLite store, one process at a time makes both.

    Raises what MLflow raises, :class:`UserError` for an experiment that has been deleted.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    uri, location = tracking_uri(), None
    lock: AbstractContextManager[object] = nullcontext()
    if uri.startswith("sqlite:///"):
        database = uri.removeprefix("sqlite:///")
        with closing(sqlite3.connect(database, timeout=LOCKED_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # where this fails MLflow itself tries for minutes
        location, lock = (root() / "mlartifacts").as_uri(), FileLock(f"{database}.lock")
    with lock:
        gc.disable()  # a third of the import's time, which the stage waits for, and it makes no garbage
        try:
            from mlflow import MlflowClient
        finally:
            gc.enable()
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return client, client.create_experiment(experiment, location)
    if found.lifecycle_stage == "deleted":
        restore = f"restore it (mlflow experiments restore --experiment-id {found.experiment_id})"
        remove = f"remove it for good (mlflow gc --experiment-ids {found.experiment_id})"
        raise UserError(f"the experiment {experiment!r} has been deleted; {restore} or {remove}")
    return client, found.experiment_id


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as (dotted key, text)."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _legible(text: str) -> str:
    """``text`` in one line, without the passwords of its URIs."""
    return " ".join(re.sub(r"//\S*@", "//", text).split())


def log_later() -> None:
    """Log what stages had to leave; it stays where the store fails again."""
    for file in sorted(unlogged().glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        try:
            stored = _StoredRun(run)
            stored.update()
        except Exception as error:
            raise UserError(_legible(f"MLflow at {tracking_uri()}: {error}; {file} is kept")) from None
        file.unlink()
        print(f"{run['experiment']} {run['run_name']}: logged as {stored.id}")


if __name__ == "__main__":
    main(log_later)
