"""A small workspace in which real stages run, are struck by signals, and leave hashes to compare."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import stage_server
import yaml

ROOT = Path(__file__).parents[1]
SCHEDULE = {"epochs": 5, "lr": 0.05, "drops": {4: 0.1}, "weight_decay": "5e-4"}
CE = {"loss": "ce", "start": "uniform"}
KL = {"loss": "kl", "start": "gaussian"}
RECIPES: dict[str, dict[str, Any]] = {  # choices that no recipe of params.yaml makes
    "fat": {"inner": CE | {"stop": {"budget": {0: 0, 2: 1}, "noise": 0.001}}, "outer": {}},
    "sat": {"inner": CE | {"stop": {"threshold": [0.2, 0.9], "ramp_until": 3}}, "outer": {}},
    "mart": {"inner": CE, "outer": {"adversarial": "bce", "beta": 5, "kl": "mart"}},
    "gairat": {"inner": CE, "outer": {}, "weights": {"rule": "gairat", "begin": 2}},
    "mail": {"inner": KL, "outer": {"beta": 5}, "weights": {"rule": "mail", "begin": 2}},
    "lbgat": {"inner": KL, "outer": {"adversarial": "mse", "beta": 1}, "batch_norm": {"guide": 2}},
    "dynat_gairat": {"labels": "guide", "inner": CE, "outer": {}, "weights": {"rule": "gairat", "begin": 2}},
    "dynat_mail": {"labels": "guide", "inner": KL, "outer": {"beta": 1}, "weights": {"rule": "mail"}},
}
CNN = {"name": "cnn", "width": 16, "depth": 2, "stem_stride": 2}
STUDY: dict[str, Any] = {
    "data": {"source": "digits", "classes": 10, "test": 60, "train": 160, "validation": 40},
    "target": CNN,
    "guide": CNN,
    "train": {"epsilon": 0.1, "epochs": 5, "lr": 0.05, "steps": 2, "batch": 10, "pad": 1, "flip": False},
    "attack": {"epsilon": 0.1, "step": 0.025, "pgd": [2, 5], "cw_steps": 5, "apgd_steps": 10, "batch": 20},
    "autoattack": {"epsilon": 0.02, "n": [4], "batch": 2, "workers": 1},
    "machine": {"device": "cpu", "threads": 1},
}
FAMILIES = [
    *("natural", "pgd_at", "trades", "at_awp", "trades_awp"),
    *("dynat", "dynat_inner", "dynat_awp_b0", "dynat_awp", "dynat_inner_awp"),
    *RECIPES,
]


def environment(folder: Path) -> dict[str, str]:
    """What a stage needs to run in ``folder`` with this code, without MLflow (the store is a folder)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    own = {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    return {**kept, **own, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}"}


FAULTY: dict[str, dict[str, Any]] = {
    "explodes": {"inner": CE, "outer": {}, "schedule": {**SCHEDULE, "drops": {3: 1e30}}},
    "learns_nothing": {"inner": CE, "outer": {}, "schedule": {**SCHEDULE, "drops": {0: 0}}},
}


def write_params(folder: Path, **changes: Any) -> None:
    """params.yaml with the one study ``mini`` selected; ``train__lr=1`` changes its ``train.lr``."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["settings"] = ["mini"]
    params["save_minutes"] = 0  # after every step, for a kill to come between two of them
    params["study"]["mini"] = json.loads(json.dumps(STUDY))
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = params["study"]["mini"]
        for name in sections:
            section = section[name]
        section[key] = value
    params["recipes"] |= {
        name: {"schedule": SCHEDULE, **recipe} for name, recipe in (RECIPES | FAULTY).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(json.dumps(params, indent=1), encoding="utf-8")  # JSON is YAML


def resumed_after(said: str) -> int:
    """The last epoch of which a training found all steps when it went on; -1 if there was none."""
    found = re.search(r"^resumed in epoch (\d+), after (\d+) of (\d+) steps$", said, re.MULTILINE)
    return -1 if found is None else int(found[1]) - (found[2] != found[3])


def hashes(*parts: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below the folders ``parts``."""
    files = [(part, file) for part in parts for file in sorted(part.rglob("*")) if file.is_file()]
    return {
        f"{part.name}/{file.relative_to(part)}": sha256(file.read_bytes()).hexdigest() for part, file in files
    }


class Workspace:
    """A folder in which the server at ``socket`` runs stages; see stage_server.py."""

    def __init__(self, folder: Path, socket: str, log: str = "log") -> None:
        self.folder, self.socket, self.log = folder, socket, folder / log

    def run(
        self,
        stage: str,
        *arguments: str,
        strike: Callable[[int], None] | None = None,
        **more: Any,
    ) -> int:
        """Run a stage to its end, with ``strike(pid)`` called beside it; returns the exit code.

        ``more`` is of the request: ``code``, ``largest_file``, ``kill_at``.
        """
        request = {
            "arguments": ["-m", f"stages.{stage}", *arguments],
            "folder": str(self.folder),
            "environment": environment(self.folder),
            **more,
        }
        with open(os.devnull) as nothing, open(self.log, "w") as log:
            files = [nothing.fileno(), log.fileno(), log.fileno()]
            with stage_server.process(self.socket, request, files) as (pid, exit_code):
                try:
                    if strike is not None:
                        strike(pid)
                except BaseException:
                    kill(pid)  # whatever the test did to it
                    exit_code()
                    raise
                return exit_code()

    def said(self) -> str:
        """All that the last stage has printed so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def chunks(self) -> list[str]:
        """The parts of an evaluation that it has finished, as it said."""
        return re.findall(r"attack: (.*)$", self.said(), re.MULTILINE)


@contextmanager
def serving(socket: str) -> Iterator[str]:
    """The process that forks stages, at ``socket``."""
    command = [sys.executable, stage_server.__file__, socket]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield socket
        process.stdin.close()


def states(folder: Path) -> list[Path]:
    """The resume state of all stages, newest last."""
    return sorted((folder / ".dvc/tmp/dynat").glob("*/*.pt"), key=lambda file: file.stat().st_mtime)


def after(seconds: float) -> Callable[[int], None]:
    """SIGKILL after a time."""

    def strike(pid: int) -> None:
        time.sleep(seconds)
        kill(pid)

    return strike


def when(found: Callable[[], Any]) -> Callable[[int], None]:
    """SIGKILL as soon as something is found."""

    def strike(pid: int) -> None:
        while running(pid):
            if found():
                kill(pid)
                return
            time.sleep(0.005)

    return strike


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of ``size`` bytes at ``folder``; yields what mounts it anew with other options."""
    folder.mkdir(parents=True, exist_ok=True)
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        yield lambda options: [
            subprocess.run([*mount, f"remount,{options}", "tmpfs", str(folder)], check=True)
        ].clear()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
