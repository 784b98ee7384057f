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
from pipelines import copy, dvc_environment
from stages_under_fire import states, write_params

pytestmark = pytest.mark.slow
PATIENCE = 240  # s; MLflow's import on a busy machine
EPOCHS = 24  # long enough for a training to be in MLflow before it is through


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, quick_path: str) -> Path:
    """A clone with the small study, its data prepared."""
    folder = copy(tmp_path_factory.mktemp("repro") / "repository")
    write_params(folder, train__epochs=EPOCHS)
    values = json.loads((folder / "params.yaml").read_text())
    values["baselines"].append("explodes")
    (folder / "params.yaml").write_text(json.dumps(values))
    assert repro(folder, "prepare@mini", PATH=quick_path)[0] == 0
    return folder


def start(folder: Path, *targets: str, **environment: str) -> "subprocess.Popen[str]":
    """``dvc repro`` in a session of its own, like one under a terminal or a scheduler."""
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *targets],
        cwd=folder,
        env=dvc_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def repro(folder: Path, *targets: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of one."""
    with start(folder, *targets, **environment) as process:
        output, _ = process.communicate()
    return process.returncode, output


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


@pytest.mark.parametrize(
    ("signum", "method", "kind", "forked"),
    [(signal.SIGTERM, "dynat", "dynat", False), (signal.SIGINT, "trades", "baseline", True)],
)
def test_a_stopped_repro_leaves_lock_and_state_and_its_mlflow_run_goes_on(
    repository: Path, quick_path: str, signum: signal.Signals, method: str, kind: str, forked: bool
) -> None:
    target = f"train_{kind}@mini-{method}-0"
    environment = {"PATH": quick_path} if forked else {}
    lock = (repository / "dvc.lock").read_bytes()
    with start(repository, target, **environment) as process:
        until(lambda: states(repository) and runs(repository, f"{method}-0"))
        os.killpg(process.pid, signum)
        output, _ = process.communicate()  # to the end of the last process that writes there
    assert process.returncode != 0
    assert "Traceback" not in output
    assert "error: " not in output
    assert re.search(
        r"^stopped; goes on in epoch \d+, after \d+ of \d+ steps at the next run$", output, re.MULTILINE
    )
    assert (repository / "dvc.lock").read_bytes() == lock
    assert not (repository / f"models/mini/{method}").joinpath("0").exists()
    until(lambda: [status for _, status in runs(repository, f"{method}-0")] == ["KILLED"])

    code, output = repro(repository, target, **environment)
    assert code == 0, output
    assert re.search(r"^resumed in epoch \d+, after \d+ of \d+ steps$", output, re.MULTILINE)
    until(lambda: [status for _, status in runs(repository, f"{method}-0")] == ["FINISHED"])
    ((run, _),) = runs(repository, f"{method}-0")
    assert steps(repository, run, "train_clean") == list(range(EPOCHS))
    assert states(repository) == []


def test_a_training_that_fails_is_a_failed_run_and_leaves_the_lock(repository: Path, quick_path: str) -> None:
    lock = (repository / "dvc.lock").read_bytes()
    code, output = repro(repository, "train_baseline@mini-explodes-0", PATH=quick_path)
    assert code != 0
    (line,) = re.findall(r"^error: .*$", output, re.MULTILINE)
    assert "the loss is not finite" in line
    assert (repository / "dvc.lock").read_bytes() == lock
    assert not (repository / "models/mini/explodes/0").exists()
    until(lambda: [status for _, status in runs(repository, "explodes-0")] == ["FAILED"])


def test_two_repros_at_once_lose_nothing(repository: Path, quick_path: str) -> None:
    """DVC lets one of them in at a time where they would collide: it may refuse, but nothing is lost."""
    targets = ["train_baseline@mini-pgd_at-0", "train_baseline@mini-natural-0"]
    waiting = list(targets)
    for _ in range(4):
        together = [start(repository, target, PATH=quick_path) for target in waiting]
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
    code, output = repro(repository, *targets)
    assert code == 0
    for target in targets:
        assert f"  {target}:\n" in lock
        assert f"Stage '{target}' didn't change, skipping" in output
    for name in ("pgd_at-0", "natural-0"):
        assert [status for _, status in until(lambda name=name: runs(repository, name))] == ["FINISHED"]
