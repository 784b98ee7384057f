"""The process that delivers to MLflow what stages have left in spool files; see :mod:`.tracking`."""

import fcntl
import json
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from dynat.runtime.tracking import root, spool_folder

POLL_S = 0.2
IDLE_S = 20.0  # how long it waits for another stage
LINGER_S = 45.0  # how long it tries to deliver what is left after the last stage
KEEP_S = 7 * 86400.0  # how long a spool file is kept that cannot be delivered
TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # MLflow's error codes
MAX_KEY, MAX_VALUE, MAX_BATCH = 250, 6000, 100  # MLflow's limits, in characters and entries
TOKEN_TAG = "dynat.token"

Message = dict[str, Any]


def main() -> None:
    """Deliver spool files until no stage has been alive for a while."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    os.chdir(root())
    with open(spool_folder() / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        os.nice(5)  # more would starve it on a busy machine
        _leave_when_idle()
        spools: dict[Path, _Spool] = {}
        troubles: dict[str, _Trouble] = {}
        while True:
            _deliver(spools, troubles)
            time.sleep(POLL_S)


def _leave_when_idle() -> None:
    """From now on, end this process some time after the last stage, whatever it is doing then."""
    last = time.monotonic()

    def check(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        paths = list(spool_folder().glob("*.jsonl"))
        if any(map(_held, paths)):
            last = time.monotonic()
        elif time.monotonic() - last > (LINGER_S if paths else IDLE_S):
            os._exit(0)

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, 2, 2)


@dataclass
class _Trouble:
    """A store that could not be reached."""

    reason: str
    delay: float
    until: float


def _deliver(spools: dict[Path, "_Spool"], troubles: dict[str, _Trouble]) -> None:
    """Deliver, oldest first, what is new; a store that fails is left alone for up to a minute."""
    for path in sorted(spool_folder().glob("*.jsonl")):
        try:
            spool = spools.get(path) or spools.setdefault(path, _Spool(path))
        except (ValueError, KeyError):  # cut by a power failure
            path.unlink()
            continue
        trouble = troubles.get(spool.uri)
        if trouble and time.monotonic() < trouble.until:
            spool.answer(warning=trouble.reason)
            continue
        try:
            delivered = spool.deliver()
        except Exception as error:
            _open_store.cache_clear()  # the database may have been replaced
            delay = min(2 * trouble.delay, 60) if trouble else 1
            troubles[spool.uri] = _Trouble(str(error), delay, time.monotonic() + delay)
            spool.answer(warning=str(error))
            delivered = time.time() - path.stat().st_mtime > KEEP_S
        else:
            troubles.pop(spool.uri, None)
        if delivered:
            path.with_suffix(".answer").unlink(missing_ok=True)
            path.unlink()
            del spools[path]


class _Spool:
    """A spool file and how much of it has been delivered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.start: Message = json.loads(file.readline())
            self.offset = file.tell()
        self.uri: str = self.start["uri"]
        self.run: _Run | None = None
        self.closed = False  # the run has been ended, or there can be none
        self.answers: Message = {}

    def deliver(self) -> bool:
        """Deliver what is new; True once all is delivered and the stage is gone. Raises what may pass."""
        alive = _held(self.path)  # asked first: what a dead stage has written is all there
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            lines = [line for line in file if line.endswith(b"\n")]
        for line in lines:
            with suppress(json.JSONDecodeError):
                self._apply(json.loads(line))
            self.offset += len(line)
        if alive:
            return False
        if self.run is not None:
            self._apply({"finish": "KILLED"})
        return True

    def _apply(self, message: Message) -> None:
        if self.closed:
            return
        try:
            if self.run is None:
                token = message.get("token", self.path.stem)
                run = _Run(_open_store(self.uri), self.start, token)
                run.describe()
                self.run = run
                self.answer(run_id=run.id)
            if "finish" in message:
                self.run.client.set_terminated(self.run.id, message["finish"], message.get("time"))
                self.closed = True
                self.answer(done=True)
            else:
                self.run.log(message)
        except Exception as error:
            if _may_pass(error):
                raise
            self.answer(warning=str(error))
            self.closed = self.run is None

    def answer(self, **news: Any) -> None:
        """Tell the stage."""
        if news.items() <= self.answers.items():
            return
        self.answers |= news
        path = self.path.with_suffix(".answer")
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.answers))
            temporary.replace(path)


class _Run:
    """A run in the store, new or continued. Everything may be done twice: it changes nothing."""

    def __init__(self, client: Any, start: Message, token: str) -> None:
        self.client, self.start = client, start
        self.tags = {**start["tags"], TOKEN_TAG: token}
        experiment = _experiment(client, start["experiment"], start["uri"])
        found = client.search_runs([experiment], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        run = (
            found[0] if found else client.create_run(experiment, start["time"], self.tags, start["run_name"])
        )
        self.id, self.before = run.info.run_id, run.data
        self.steps: dict[str, set[int]] = {}  # what the run had before, by metric

    def describe(self) -> None:
        """Log tags and parameters; parameters cannot change, so a continued run keeps its own."""
        from mlflow.entities import Param

        self.log({"tags": self.tags})
        texts = {key: text for key, text in _flat(self.start["params"]) if key not in self.before.params}
        params = [Param(key, text) for key, text in texts.items()]
        for first in range(0, len(params), MAX_BATCH):
            self.client.log_batch(self.id, params=params[first : first + MAX_BATCH])

    def log(self, message: Message) -> None:
        """Log a message's metrics and tags."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, float(value), message["time"], message["step"])
            for key, value in message.get("metrics", {}).items()
            if message["step"] not in self._steps_before(key)
        ]
        tags = [RunTag(key, str(value)[:MAX_VALUE]) for key, value in message.get("tags", {}).items()]
        self.client.log_batch(self.id, metrics=metrics, tags=tags)

    def _steps_before(self, key: str) -> set[int]:
        if key not in self.steps:
            history = self.client.get_metric_history(self.id, key) if key in self.before.metrics else ()
            self.steps[key] = {metric.step for metric in history}
        return self.steps[key]


@lru_cache
def _open_store(uri: str) -> Any:
    """An ``MlflowClient``; a SQLite store is created, or brought up to date, by one process at a time."""
    database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if database:
        _probe(database)  # before seconds are spent on the import
    signal.setitimer(signal.ITIMER_REAL, 0)  # the import ends by itself, on a busy machine late
    for name in ("pandas", "numpy"):  # MLflow does without, and starts seconds sooner
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    from mlflow import MlflowClient

    _leave_when_idle()
    if not database:
        return MlflowClient(uri)
    from mlflow.db import upgrade
    from mlflow.store.db.utils import _get_latest_schema_revision

    with _locked(database.parent):
        version = _schema_version(database)
        if version not in (None, _get_latest_schema_revision()):
            _copy(database, Path(f"{database}.{version}.bak"))  # as MLflow advises
            upgrade.callback(uri)  # type: ignore[misc]  # a click command
        return MlflowClient(uri)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` locked, where the file system can: other repositories may share its database."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _probe(database: Path) -> None:
    """Raise if the SQLite file cannot be written; MLflow itself would try for minutes."""
    with closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def _schema_version(database: Path) -> str | None:
    """MLflow's schema version of a SQLite file, None where there is none yet."""
    with closing(sqlite3.connect(database)) as connection, suppress(sqlite3.OperationalError):
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])
    return None


def _copy(database: Path, backup: Path) -> None:
    if not backup.exists():
        partial = backup.with_suffix(".tmp")
        with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(partial)) as new:
            old.backup(new)
        partial.rename(backup)


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment ``name``, which another process may be creating at the same moment."""
    location = (root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, location))
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return str(found.experiment_id)


def _flat(params: Message, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as (dotted key, text), within MLflow's alphabet and limits."""
    for name, value in params.items():
        key = prefix + re.sub(r"[^\w\-. :/]", "_", name)
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        else:
            yield key[:MAX_KEY], (value if isinstance(value, str) else json.dumps(value))[:MAX_VALUE]


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: a server that is down, a lock, a full disk, a broken file."""
    code = getattr(error, "error_code", None)
    if code is None:
        return isinstance(error, OSError | sqlite3.Error) or type(error).__name__ == "OperationalError"
    return code in TRANSIENT


def _held(path: Path) -> bool:
    """Whether a living process holds ``path`` locked."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    main()
