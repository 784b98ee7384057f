"""MLflow runs, fed through files so that tracking neither slows nor fails a training.

Importing MLflow takes seconds of a core, so a stage never does it. A :class:`Tracker` appends JSON lines to
a spool file under ``$DVC_ROOT/.dvc/tmp/dynat/mlflow/``, and one process per repository, :mod:`.courier`,
delivers them. It waits a little for the next stage, so that a whole ``dvc repro`` pays for one import. What
it cannot deliver stays for the next.
"""

import fcntl
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

POLL_S = 0.05
ENVIRONMENT = {  # MLflow's own defaults report home, and ask a dead server for minutes
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
DVC_TAGS = {
    "dvc.stage": "DVC_STAGE",
    "dvc.exp_name": "DVC_EXP_NAME",
    "dvc.baseline_rev": "DVC_EXP_BASELINE_REV",
}


def root() -> Path:
    """The user's repository, also in DVC's temporary workspaces."""
    return Path(os.environ.get("DVC_ROOT", "")).resolve()


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else the SQLite file in the user's repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def spool_folder() -> Path:
    """Where stages leave ``*.jsonl`` for the courier, which answers beside them in ``*.answer``."""
    return root() / ".dvc" / "tmp" / "dynat" / "mlflow"


class Tracker:
    """One MLflow run. No method raises or waits for MLflow; its trouble is at most one line on stderr.

    ``params`` may be nested; keys are joined by dots. In a ``with``, an error ends the run as FAILED. A stage
    that dies without :meth:`finish` leaves the run as KILLED, one that sends nothing leaves no run.
    """

    def __init__(
        self, experiment: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        self._warned = False
        self._run_id: str | None = None
        self._spool = spool_folder() / f"{time.time_ns()}-{uuid.uuid4().hex}.jsonl"
        self._file = -1
        dvc = {tag: os.environ[name] for tag, name in DVC_TAGS.items() if name in os.environ}
        try:
            self._spool.parent.mkdir(parents=True, exist_ok=True)
            unseen = self._spool.with_suffix(".new")
            self._file = os.open(unseen, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)  # held as long as this process lives
            start = {"uri": tracking_uri(), "experiment": experiment, "run_name": run_name}
            self._send(**start, tags={**dvc, **tags}, params=params)
            unseen.rename(self._spool)
            _call_courier()
        except OSError as error:
            self._warn(str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED", timeout=0)

    @property
    def run_id(self) -> str | None:
        """The run's id, from some seconds after the run was opened."""
        self._answered()
        return self._run_id

    def begin(self, token: str) -> None:
        """Open the run now, or go on with the one begun with the same ``token`` (of the resume state)."""
        self._send(token=token)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log ``values`` at ``step``; in a continued run, steps that are already there are left alone."""
        self._send(metrics=values, step=step)
        self._answered()

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._send(tags=values)

    def finish(self, status: str = "FINISHED", timeout: float = 30) -> str | None:
        """End the run as FINISHED, FAILED or KILLED and return its id, if known within ``timeout`` seconds.

        The courier goes on to deliver what is not delivered by then; a timeout of 0 leaves all to it.
        """
        if self._file < 0:
            return self._run_id
        self._send(finish=status)
        try:
            _call_courier()  # the first one may have been killed
        except OSError as error:
            self._warn(str(error))
        deadline = time.monotonic() + timeout
        while not (done := self._answered()) and not self._warned and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if timeout and not done:
            self._warn(f"no answer within {timeout:g} s")
        os.close(self._file)
        self._file = -1
        return self._run_id

    def _send(self, **message: Any) -> None:
        if self._file < 0:
            return
        message["time"] = time.time_ns() // 1_000_000  # ms, MLflow's unit
        try:
            os.write(self._file, json.dumps(message, default=_plain, skipkeys=True).encode() + b"\n")
        except (OSError, TypeError, ValueError, RecursionError) as error:
            self._warn(str(error))

    def _answered(self) -> bool:
        """Read the courier's answer, if any; True once the run is ended in the store."""
        try:
            answer = json.loads(self._spool.with_suffix(".answer").read_bytes())
        except (OSError, ValueError):
            return False
        self._run_id = answer.get("run_id")
        if "warning" in answer:
            self._warn(answer["warning"])
        return "done" in answer

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            line = " ".join(f"MLflow at {tracking_uri()}: {reason}".split())
            line = re.sub(r"//[^/@\s]+@", "//", line)  # no passwords
            print(f"warning: {line[:400]}; the stage goes on without it", file=sys.stderr)


def _call_courier() -> None:
    """Start a courier; it leaves at once if there is one already."""
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-m", "dynat.runtime.courier"],
        {**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(path)},
        setpgroup=0,  # Ctrl-C is for the stage
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)],
    )


def _plain(value: Any) -> Any:
    """What JSON does not know: mappings, numbers such as NumPy's, and the rest as text."""
    if isinstance(value, Mapping):
        return dict(value)
    return float(value) if hasattr(value, "__float__") else str(value)
