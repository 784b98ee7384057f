"""What runs on a node: one stage in the one workspace, from its command to DVC's run cache."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from dynat.audit.history import git
from dynat.errors import UserError
from dynat.fleet import supervisor
from dynat.fleet.dvc_stages import StageFiles, changed, key_of
from dynat.runtime.record import installed
from dynat.runtime.stage import INTERRUPTED

MISTAKE = 2
GRACE_S = 60.0  # between the request to stop and SIGKILL
BUSY_S = 600.0  # how long an earlier attempt, cut off from the others, may hold the resume state
POLL_S = 0.2
BUSY = "this stage already runs as process"
OF_THE_DRIVER = ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONBREAKPOINT", "CUDA_DEVICE_ORDER", "PATH")
PASSED = ("DYNAT_", "MLFLOW_")  # also of the driver: a stage needs them everywhere
PACKAGES = ("torch", "torchvision", "numpy", "pyautoattack", "safetensors", "dvc", "mlflow", "ray")
Ended = Literal["done", "stopped", "interrupted", "mistake", "failed"]


@dataclass(frozen=True)
class Job:
    """One attempt at one stage."""

    root: Path
    name: str
    planned: dict[str, Any]  # what it depends on
    environment: dict[str, str]  # of the driver
    gpus: float
    attempt: int  # from 1
    stop: Path  # its presence asks to leave

    @property
    def log(self) -> Path:
        """What the command prints, of all attempts."""
        return log_of(self.root, self.name)

    @property
    def result(self) -> Path:
        """How the last command ended."""
        return result_of(self.root, self.name)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and where."""

    ended: Ended
    why: str = ""
    node: str = ""
    gpu: str = ""
    seconds: float = 0.0  # of the command; 0 if it was not run


def folder_of(root: Path) -> Path:
    """Where fleets keep their files: below what neither Git nor DVC looks at."""
    return root / ".dvc" / "tmp" / "fleet"


def log_of(root: Path, name: str) -> Path:
    """What the command of a stage prints."""
    return folder_of(root) / "logs" / f"{name}.log"


def result_of(root: Path, name: str) -> Path:
    """How the last command of a stage ended."""
    return folder_of(root) / "results" / f"{name}.json"


def environment_of_driver() -> dict[str, str]:
    """What a stage is given of this process's environment, on whatever node."""
    return {
        name: value for name, value in os.environ.items() if name in OF_THE_DRIVER or name.startswith(PASSED)
    }


def run_stage(job: Job) -> Outcome:
    """Run a stage unless it has been run, and save it in DVC's run cache; an exception is a fault of ours."""
    os.chdir(job.root)
    node, gpu = platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES", "") if job.gpus else ""
    begun, seconds = time.monotonic(), 0.0
    files = StageFiles.open(job.root, job.name)
    try:
        if (now := files.dependencies()) != job.planned:
            return Outcome("mistake", f"changed after the plan was made: {changed(job.planned, now)}", node)
        files.forget_outputs()  # as the driver did, which restores from the run cache and from no lock
        if files.kept and files.cached():
            return Outcome("done", "in the run cache", node)
        while not finished(files, job.planned, job.result):
            started = time.monotonic()
            status = _supervised(job, files, node, gpu)
            seconds = time.monotonic() - started
            if status == 0:
                break
            if status == MISTAKE and BUSY in _last_line(job.log) and time.monotonic() - begun < BUSY_S:
                if _wait(job.stop, 5.0):
                    return Outcome("stopped", node=node)
                continue
            return _failure(job, status, node, gpu)
        if (now := files.dependencies()) != job.planned:
            return Outcome("mistake", f"changed while it ran: {changed(job.planned, now)}", node, gpu)
        files.save()
    except UserError as error:
        return Outcome("mistake", str(error), node, gpu)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return Outcome("mistake", f"its result could not be saved: {where}{error.strerror}", node, gpu)
    return Outcome("done", "", node, gpu, seconds)


def finished(files: StageFiles, planned: dict[str, Any], result: Path) -> bool:
    """Whether the command has run to its end with these dependencies, and its outputs are as it left them."""
    try:
        known = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        files.kept
        and known["key"] == key_of(planned)
        and known["status"] == 0
        and known["outputs"] == {name: supervisor.sha256(Path(name)) for name in files.outputs}
    )


def stage_environment(job: Job, node: str, gpu: str) -> dict[str, str]:
    """This node's environment without what Ray put into it, with the driver's part and what DVC gives.

    Ray sets OMP_NUM_THREADS, which is in the key of a resume state and can alter bits; it leaves
    CUDA_VISIBLE_DEVICES unset for a stage that must not use a GPU.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", *PASSED)) and name not in (*OF_THE_DRIVER, "DVC_STAGE")
    }
    own = {
        "CUDA_VISIBLE_DEVICES": gpu,
        "DVC_ROOT": str(job.root),
        "DVC_STAGE": job.name,
        "DYNAT_NODE": node,
        "DYNAT_GPU": gpu,
        "DYNAT_ATTEMPT": str(job.attempt),
        "DYNAT_STATUSES": str(job.result.with_suffix(".statuses")),
    }
    return {**kept, **job.environment, **own}


def _supervised(job: Job, files: StageFiles, node: str, gpu: str) -> int:
    """Run the command below a supervisor, which ends it when this process ends or ``job.stop`` appears."""
    for path in (job.log, job.result):
        path.parent.mkdir(parents=True, exist_ok=True)
    environment = stage_environment(job, node, gpu)
    reading, writing = os.pipe()
    request = {
        "command": files.command,
        "watch": reading,
        "grace": GRACE_S,
        "key": key_of(job.planned),
        "outputs": files.outputs,
        "result": str(job.result),
        "statuses": environment["DYNAT_STATUSES"],
    }
    where = f"attempt {job.attempt} on {node}" + (f", GPU {gpu}" if gpu else "")
    try:
        with open(job.log, "ab", buffering=0) as log:
            log.write(f"--- {time.strftime('%F %T')} {where}: {files.command}\n".encode())
            script = [sys.executable, "-S", supervisor.__file__, json.dumps(request)]
            process = subprocess.Popen(
                script,
                cwd=job.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[reading],
                process_group=0,
            )
        os.close(reading)
        while process.poll() is None:
            if writing >= 0 and job.stop.exists():
                os.close(writing)
                writing = -1
            time.sleep(POLL_S)
    finally:
        if writing >= 0:
            os.close(writing)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _failure(job: Job, status: int, node: str, gpu: str) -> Outcome:
    """What an exit status other than 0 means."""
    if job.stop.exists():
        return Outcome("stopped", node=node, gpu=gpu)
    why = f"exit status {status}: {_last_line(job.log)}"
    ended: Ended = "failed"
    if status == MISTAKE:
        ended = "mistake"
    elif status == INTERRUPTED or status > 128:
        ended = "interrupted"
    return Outcome(ended, why, node, gpu)


def _wait(stop: Path, seconds: float) -> bool:
    """Whether ``stop`` appeared within a time."""
    end = time.monotonic() + seconds
    while not stop.exists() and time.monotonic() < end:
        time.sleep(POLL_S)
    return stop.exists()


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# ------------------------------------------------------------------------------------------ before the work


def facts(root: Path, nonce: str) -> dict[str, Any]:
    """What must be equal on all nodes: versions and commit; and "fault", what is wrong with this one."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "commit": _commit(root),
        "fault": _fault(root, nonce),
    }


def _fault(root: Path, nonce: str) -> str:
    """Why this node cannot work in ``root``; empty if it can."""
    try:
        if (folder_of(root) / "nonce").read_text() != nonce:
            raise FileNotFoundError
    except OSError:
        return f"does not share {root}; the repository must be on a file system that all nodes mount there"
    if not Path(__file__).resolve().is_relative_to(root.resolve()):
        return (
            f"runs the code of {Path(__file__).resolve().parents[2]}; start Ray there with PYTHONPATH={root}"
        )
    try:
        with FileLock(folder_of(root) / "lock").acquire(timeout=0):
            return (
                f"got a lock that the driver holds in {root}; mount that file system with locks for all nodes"
            )
    except Timeout:
        return ""


def different(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What two nodes differ in, "" if in nothing that counts."""
    return ", ".join(
        f"{name} {other[name]}, not {own[name]}"
        for name in own
        if name not in ("host", "fault") and own[name] != other.get(name)
    )


def _commit(root: Path) -> str | None:
    """The commit that is checked out, None where Git cannot say."""
    head = git(root, "rev-parse", "HEAD")
    return head.decode().strip() if head else None
