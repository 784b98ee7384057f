"""What an edit of the code makes DVC do: a reworded message nothing, a changed constant what it must."""

import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from cosmetics import cosmetic, edit
from pipelines import choose, dvc

pytestmark = pytest.mark.slow


def stale(folder: Path) -> set[str]:
    """The stages that DVC would run for a reason of their own."""
    done = dvc(folder, "status", "--json")
    assert done.returncode == 0, done.stderr
    return {*json.loads(done.stdout)}


def checked(folder: Path) -> set[str]:
    """The stages that are stale once ``check`` has run."""
    done = dvc(folder, "repro", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    return stale(folder)


def test_comments_docstrings_messages_and_layout_of_every_module_make_check_stale_alone(
    pipeline: Path,
) -> None:
    for name in ("dynat", "stages"):
        for path in (pipeline / name).rglob("*.py"):
            if path.stat().st_size:
                edit(path, cosmetic)
    assert stale(pipeline) == {"check"}
    assert checked(pipeline) == set()


def test_a_constant_of_the_objectives_makes_the_trainings_stale_and_a_format_the_tables_alone(
    pipeline: Path,
) -> None:
    edit(pipeline / "dynat/paper/cells.py", lambda text: text.replace("[{low:.1f}, ", "({low:.1f}, "))
    assert checked(pipeline) == {"tabulate"}
    edit(pipeline / "dynat/methods/objectives.py", lambda text: text.replace("1.0001 - ", "1.0002 - "))
    runs = [f"{name}-{seed}" for name in ("baseline@digits-pgd_at", "dynat@digits-dynat") for seed in (0, 1)]
    assert checked(pipeline) == {"tabulate", *(f"train_{run}" for run in runs)}


def test_a_check_that_fails_touches_nothing(pipeline: Path) -> None:
    choose(pipeline, {"alpha": -1})
    edit(pipeline / "dynat/methods/objectives.py", lambda text: text.replace("1.0001 - ", "1.0002 - "))
    before = contents(pipeline)
    done = dvc(pipeline, "repro")
    assert done.returncode != 0
    assert "error: params.yaml: alpha: " in done.stderr
    assert contents(pipeline) == before


def contents(folder: Path) -> dict[str, str]:
    files = [path for top in ("data", "metrics", "models") for path in (folder / top).rglob("*")]
    files = [path for path in [*files, folder / "dvc.lock"] if path.is_file()]
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_training_stopped_half_way_goes_on_after_a_comment(pipeline: Path) -> None:
    choose(pipeline, {"study.digits.train.epochs": 8, "save_minutes": 0})
    process = train(pipeline)
    states = pipeline / ".dvc/tmp/dynat"
    while not list(states.glob("*/state*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    edit(pipeline / "dynat/methods/step.py", lambda text: f"# A comment.\n{text}")
    done = train(pipeline)
    said, errors = done.communicate()
    assert done.returncode == 0, errors
    assert "resumed in epoch" in said


def train(folder: Path) -> "subprocess.Popen[str]":
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train", "digits", "pgd_at", "0"],
        cwd=folder,
        env={**kept, "DVC_ROOT": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
