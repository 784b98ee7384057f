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
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from filelock import FileLock

from dynat.errors import UserError
from dynat.runtime.files import write_json
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
PATIENCE_S = 30.0  # and the end of a stage for the thread;
HURRY_S = 5.0  # of one that was asked to stop, or whose store has just failed

Message = dict[str, Any]  # "time" (ms) and "metrics" of a "step", "tags" or a final "status"


def root() -> Path:
    """The user's repository, also in DVC's temporary workspaces."""
    return Path(os.environ.get("DVC_ROOT", "")).resolve()


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
        self._start: Message = {"experiment": experiment, "run_name": run_name, "params": dict(_flat(params))}
        self._messages: list[Message] = []
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._log, name="mlflow", daemon=True)
        self._run_id: str | None = None
        self._failing = self._warned = False
        dvc = {tag: os.environ[name] for tag, name in DVC_TAGS.items() if name in os.environ}
        self.tags({**dvc, **tags})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def begin(self, token: str, history: Iterable[Mapping[str, float]] = ()) -> None:
        """Open the run, or go on with the one begun with the same ``token`` (of the resume state).

        ``history`` are the rows so far, each with its "epoch"; those that the store lacks are logged. A
        second call does nothing. No process may be forked after it: the thread imports MLflow, whose locks
        the fork would find held for ever.
        """
        if self._thread.ident is not None:
            return
        self._start["token"] = token
        for row in history:
            self.metrics(row)
        self._thread.start()

    def metrics(self, row: Mapping[str, float]) -> None:
        """Log ``row`` at its "epoch", else at step 0; in a continued run what is there is left alone."""
        values = {name: value for name, value in row.items() if name != "epoch"}
        self._send(step=int(row.get("epoch", 0)), metrics=values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._send(tags=dict(values))

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the run as FINISHED, FAILED or KILLED; its id, or None if the store does not have it all."""
        if not self._thread.is_alive():
            return self._run_id
        self._send(status=status)
        self._thread.join(HURRY_S if status == "KILLED" or self._failing else PATIENCE_S)
        hangs = self._thread.is_alive()
        file = unlogged() / f"{self._start['token']}.json"
        with suppress(OSError, UserError):
            if not (hangs or self._failing):
                file.unlink(missing_ok=True)  # of an earlier start
                return self._run_id
            if status != "KILLED":  # the next start has its history
                write_json(file, [self._start, *self._messages])
        if hangs and status != "KILLED":
            self._warn("does not answer")
        return None

    def _send(self, **message: Any) -> None:
        self._messages.append({**message, "time": time.time_ns() // 1_000_000})
        self._news.set()

    def _log(self) -> None:
        """The thread: log what is new, until the end of the run has been tried."""
        run, logged, ended = None, 0, False
        while not ended:
            self._news.wait()
            self._news.clear()
            messages = self._messages[logged:]
            ended = any("status" in message for message in messages)
            try:
                if run is None:
                    with _quick_import():
                        run = _StoredRun(self._start)
                    self._run_id = run.id
                run.log(messages)
                logged += len(messages)
                self._failing = False
            except Exception as error:
                run, self._failing = None, True
                self._warn(str(error))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            line = f"MLflow at {tracking_uri()}: {reason}; the stage goes on, {COMMAND} logs the rest later"
            print(f"warning: {_legible(line)}", file=sys.stderr)


class _StoredRun:
    """A run in the store, new or continued. All of it may be done twice: that changes nothing."""

    def __init__(self, start: Message) -> None:
        client, experiment = _open_store(start["experiment"])
        from mlflow.entities import Param

        found = client.search_runs([experiment], f"tags.`{TOKEN_TAG}` = '{start['token']}'", max_results=1)
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {TOKEN_TAG: start["token"]}
            run = client.create_run(experiment, tags=tags, run_name=start["run_name"])
        self._client, self.id = client, run.info.run_id
        params = [Param(key, text) for key, text in start["params"].items() if key not in run.data.params]
        client.log_batch(self.id, params=params)
        points = {key: client.get_metric_history(self.id, key) for key in run.data.metrics}
        self._before = {(key, each.step) for key, history in points.items() for each in history}

    def log(self, messages: Iterable[Message]) -> None:
        """Log metrics, tags and the end of the run, in their order."""
        from mlflow.entities import Metric, RunTag

        for message in messages:
            if "status" in message:
                self._client.set_terminated(self.id, message["status"])
                continue
            metrics = [
                Metric(key, value, message["time"], message["step"])
                for key, value in message.get("metrics", {}).items()
                if (key, message["step"]) not in self._before
            ]
            tags = [RunTag(key, value) for key, value in message.get("tags", {}).items()]
            self._client.log_batch(self.id, metrics=metrics, tags=tags)


def _open_store(experiment: str) -> tuple[Any, str]:
    """An ``MlflowClient`` and the id of ``experiment``; of a SQLite store, one process at a time makes both.

    Raises what MLflow raises, :class:`UserError` for an experiment that has been deleted.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri()
    if not uri.startswith("sqlite:///"):
        return _client_and_experiment(uri, experiment, None)
    database = uri.removeprefix("sqlite:///")
    with closing(sqlite3.connect(database, timeout=LOCKED_S, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # where it cannot be written MLflow itself tries for minutes
        connection.execute("ROLLBACK")
    with FileLock(f"{database}.lock"):
        return _client_and_experiment(uri, experiment, (root() / "mlartifacts").as_uri())


def _client_and_experiment(uri: str, name: str, location: str | None) -> tuple[Any, str]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        return client, client.create_experiment(name, location)
    if found.lifecycle_stage == "deleted":
        restore = f"restore it (mlflow experiments restore --experiment-id {found.experiment_id})"
        remove = f"remove it for good (mlflow gc --experiment-ids {found.experiment_id})"
        raise UserError(f"the experiment {name!r} has been deleted; {restore} or {remove}")
    return client, found.experiment_id


@contextmanager
def _quick_import() -> Iterator[None]:
    """Halve the time for which the import of MLflow, on this thread, keeps the others from the interpreter.

    A third of it are collections of garbage that an import does not make, a sixth is pandas, which MLflow
    does without; other threads find it as ever.
    """
    thread = threading.get_ident()

    def hide(name: str, *_: object) -> None:
        if name == "pandas" and threading.get_ident() == thread:
            raise ModuleNotFoundError(name=name)

    finder: Any = SimpleNamespace(find_spec=hide)
    sys.meta_path.insert(0, finder)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        sys.meta_path.remove(finder)


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
        start, *messages = json.loads(file.read_text(encoding="utf-8"))
        try:
            run = _StoredRun(start)
            run.log(messages)
        except Exception as error:
            raise UserError(_legible(f"MLflow at {tracking_uri()}: {error}; {file} is kept")) from None
        file.unlink()
        print(f"{start['experiment']} {start['run_name']}: logged as {run.id}")


if __name__ == "__main__":
    main(log_later)
