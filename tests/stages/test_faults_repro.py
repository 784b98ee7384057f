"""``dvc repro`` under signals and beside another: the lock file, the outputs and MLflow stay right."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pipelines import copy
from stages_under_fire import environment, states, write_params

pytestmark = pytest.mark.slow
PATIENCE = 240  # s; MLflow's import on a busy machine


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the small study, its data prepared."""
    folder = copy(tmp_path_factory.mktemp("repro") / "repository")
    write_params(folder, train__epochs=8)
    values = json.loads((folder / "params.yaml").read_text())
    values["baselines"].append("explodes")
    (folder / "params.yaml").write_text(json.dumps(values))
    with start(folder, "prepare@mini") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder


def start(folder: Path, target: str) -> "subprocess.Popen[str]":
    """``dvc repro`` in a session of its own, like one under a terminal or a scheduler."""
    kept = environment(folder)
    for name in ("MLFLOW_TRACKING_URI", "PYTHONPATH", "DVC_ROOT"):
        del kept[name]
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", target],
        cwd=folder,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(found: Callable[[], Any], patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value, "waited in vain"
    return value


def runs(folder: Path, name: str) -> list[tuple[str, str]]:
    """(id, status) of the MLflow runs with a name, straight from the tables."""
    try:
        with closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)) as store:
            return store.execute("SELECT run_uuid, status FROM runs WHERE name = ?", [name]).fetchall()
    except sqlite3.OperationalError:  # not there yet
        return []


def steps(folder: Path, run: str, key: str) -> list[int]:
    with closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)) as store:
        query = "SELECT step FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step"
        return [step for (step,) in store.execute(query, [run, key])]


def training_processes(folder: Path) -> list[int]:
    """Living stages of this repository, by the resume state they hold."""
    tokens = (folder / ".dvc/tmp/dynat").glob("?" * 64 + "/token")
    pids = [token.read_text().split()[-1] for token in tokens]
    return [int(pid) for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("signum", "method", "kind"),
    [(signal.SIGTERM, "dynat", "dynat"), (signal.SIGINT, "trades", "baseline")],
)
def test_a_stopped_repro_leaves_lock_and_state_and_its_mlflow_run_goes_on(
    repository: Path, signum: signal.Signals, method: str, kind: str
) -> None:
    target = f"train_{kind}@mini-{method}-0"
    lock = (repository / "dvc.lock").read_bytes()
    with start(repository, target) as process:
        until(lambda: [state for state in states(repository) if state.name == "state-00000002.pt"])
        begun = time.monotonic()
        os.killpg(process.pid, signum)
        output, _ = process.communicate()
    until(lambda: not training_processes(repository), 10)
    assert time.monotonic() - begun < 10
    assert process.returncode != 0
    assert "Traceback" not in output
    assert "error: " not in output
    assert re.search(r"^stopped; epoch \d starts again at the next run$", output, re.MULTILINE)
    assert (repository / "dvc.lock").read_bytes() == lock
    assert not (repository / f"models/mini/{method}").joinpath("0").exists()
    until(lambda: [status for _, status in runs(repository, f"{method}-0")] == ["KILLED"])

    with start(repository, target) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert re.search(r"^resumed after epoch [1-7]$", output, re.MULTILINE)
    until(lambda: [status for _, status in runs(repository, f"{method}-0")] == ["FINISHED"])
    ((run, _),) = runs(repository, f"{method}-0")
    assert steps(repository, run, "train_clean") == list(range(8))
    assert states(repository) == []


def test_a_training_that_fails_is_a_failed_run_and_leaves_the_lock(repository: Path) -> None:
    lock = (repository / "dvc.lock").read_bytes()
    with start(repository, "train_baseline@mini-explodes-0") as process:
        output, _ = process.communicate()
    assert process.returncode != 0
    (line,) = re.findall(r"^error: .*$", output, re.MULTILINE)
    assert "the loss is not finite" in line
    assert (repository / "dvc.lock").read_bytes() == lock
    assert not (repository / "models/mini/explodes/0").exists()
    until(lambda: [status for _, status in runs(repository, "explodes-0")] == ["FAILED"])


def test_two_repros_at_once_lose_nothing(repository: Path) -> None:
    """DVC lets one of them in at a time where they would collide: it may refuse, but nothing is lost."""
    targets = ["train_baseline@mini-pgd_at-0", "train_baseline@mini-natural-0"]
    waiting = list(targets)
    for _ in range(4):
        together = [start(repository, target) for target in waiting]
        outputs = []
        for process in together:
            with process:
                outputs.append(process.communicate()[0])
        for output, process in zip(outputs, together, strict=True):
            assert process.returncode == 0 or "lock" in output, output
            assert "Traceback" not in output
        waiting = [t for t, process in zip(waiting, together, strict=True) if process.returncode]
        if not waiting:
            break
    assert waiting == []
    lock = (repository / "dvc.lock").read_text()
    for target in targets:
        assert f"  {target}:\n" in lock
        with start(repository, target) as process:
            output, _ = process.communicate()
        assert process.returncode == 0
        assert f"Stage '{target}' didn't change, skipping" in output
    for name in ("pgd_at-0", "natural-0"):
        assert until(lambda name=name: runs(repository, name))
        assert [status for _, status in runs(repository, name)] == ["FINISHED"]
