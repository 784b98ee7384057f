"""A small workspace in which real stages run, are struck by signals, and leave hashes to compare."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

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
    "data": {"source": "digits", "classes": 10, "test": 60, "train": 320, "validation": 40},
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


def hashes(*parts: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below the folders ``parts``."""
    files = [(part, file) for part in parts for file in sorted(part.rglob("*")) if file.is_file()]
    return {
        f"{part.name}/{file.relative_to(part)}": sha256(file.read_bytes()).hexdigest() for part, file in files
    }


@dataclass
class Tally:
    """Kills that struck, and the work that each of them cost."""

    families: set[str] = field(default_factory=set)
    kills: dict[str, int] = field(default_factory=dict)  # by what was going on
    lost: list[float] = field(default_factory=list)  # seconds since the last saved state
    run: list[float] = field(default_factory=list)  # seconds of an uninterrupted training

    def add(self, what: str, seconds: float) -> None:
        self.kills[what] = self.kills.get(what, 0) + 1
        self.lost.append(seconds)


class Server:
    """The process that forks stages; see stage_server.py."""

    def __init__(self, folder: Path, log: str) -> None:
        self.folder, self.log = folder, folder / log
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/stage_server.py")],
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(
        self,
        stage: str,
        *arguments: str,
        strike: Callable[[int], None] | None = None,
        largest_file: int | None = None,
    ) -> int:
        """Run a stage to its end, with ``strike(pid)`` called beside it; returns the exit code.

        ``largest_file`` is the size in bytes beyond which the kernel lets it write no file.
        """
        self.log.unlink(missing_ok=True)
        request = {"stage": stage, "arguments": arguments, "folder": str(self.folder), "log": str(self.log)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**request, "largest_file": largest_file}) + "\n")
        self.process.stdin.flush()
        pid = int(self._line())
        try:
            if strike is not None:
                strike(pid)
        except BaseException:
            kill(pid)  # whatever the test did to it
            self._line()
            raise
        return int(self._line())

    def said(self) -> str:
        """All that the last stage printed."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


@contextmanager
def server(folder: Path, log: str = "log") -> Iterator[Server]:
    found = Server(folder, log)
    try:
        yield found
    finally:
        assert found.process.stdin is not None
        assert found.process.stdout is not None
        found.process.stdin.close()
        found.process.wait(timeout=60)
        found.process.stdout.close()


def states(folder: Path) -> list[Path]:
    """The resume state of all stages, newest last."""
    files = [
        *(folder / ".dvc/tmp/dynat").glob("*/state-*.pt"),
        *(folder / ".dvc/tmp/dynat").glob("*/piece-*.pt"),
    ]
    return sorted(files, key=lambda file: file.stat().st_mtime)


def after(seconds: float) -> Callable[[int], None]:
    """SIGKILL after a time."""

    def strike(pid: int) -> None:
        time.sleep(seconds)
        kill(pid)

    return strike


def while_there_is(folder: Path, pattern: str, skip: int = 0) -> Callable[[int], None]:
    """SIGKILL as soon as there is a file ``pattern`` below ``folder``, but for the first ``skip`` of them."""

    def strike(pid: int) -> None:
        seen: set[str] = set()
        while running(pid):
            with suppress(FileNotFoundError):  # renamed between two looks
                seen |= {str(path) for path in folder.glob(pattern)}
            if len(seen) > skip:
                kill(pid)
                return

    return strike


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
