"""What stops a stage costs one line and no finished work; resume state of anything else is never used."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stages_under_fire import (
    ROOT,
    Server,
    environment,
    hashes,
    kill,
    running,
    server,
    states,
    while_there_is,
    write_params,
)

pytestmark = pytest.mark.slow
CELL = ("mini", "pgd_at", "0")
SECOND_SAVE = ".dvc/tmp/dynat/*/state-00000002.pt"


def bytes_of(stages: Server, *cell: str) -> dict[str, str]:
    """Train in peace and return the hashes of the model folder, which is removed."""
    assert stages.run("train", *cell) == 0, stages.said()
    outputs = stages.folder.joinpath("models", *cell)
    found = hashes(outputs)
    shutil.rmtree(outputs)
    return found


def model(stages: Server) -> dict[str, str]:
    return hashes(stages.folder.joinpath("models", *CELL))


def kill_after_second_save(stages: Server) -> None:
    strike = while_there_is(stages.folder, SECOND_SAVE)
    assert stages.run("train", *CELL, strike=strike) == -signal.SIGKILL, stages.said()


def the_error(said: str) -> str:
    """The only line that is about an error."""
    assert "Traceback" not in said
    (line,) = re.findall(r"^.*(?:error|Error).*$", said, re.MULTILINE)
    assert line.startswith("error: ")
    return line


# ---------------------------------------------------------------------------------------- the right state


def other_learning_rate(stages: Server) -> None:
    write_params(stages.folder, train__lr=0.07)


def other_data(stages: Server) -> None:
    write_params(stages.folder, data__split_seed=1)
    assert stages.run("prepare", "mini") == 0, stages.said()


def other_network(stages: Server) -> None:
    write_params(stages.folder, target={"name": "cnn", "width": 8, "depth": 1})


def as_before(stages: Server) -> None:
    write_params(stages.folder)
    assert stages.run("prepare", "mini") == 0, stages.said()


@pytest.mark.parametrize("change", [other_learning_rate, other_data, other_network])
def test_state_of_other_parameters_or_data_is_not_used_and_kept_for_when_it_is_wanted(
    stages: Server, change: Callable[[Server], None]
) -> None:
    expected = bytes_of(stages, *CELL)
    change(stages)
    other = bytes_of(stages, *CELL)
    assert other != expected

    as_before(stages)
    kill_after_second_save(stages)
    kept = states(stages.folder)
    change(stages)
    assert bytes_of(stages, *CELL) == other
    assert "resumed" not in stages.said()
    assert states(stages.folder) == kept
    as_before(stages)
    assert stages.run("train", *CELL) == 0, stages.said()
    assert re.search(r"^resumed after epoch [1-4]$", stages.said(), re.MULTILINE)
    assert model(stages) == expected


@pytest.mark.parametrize(("stage", "file", "pieces"), [("attack", "sanity", 7), ("autoattack", "square", 8)])
def test_pieces_of_other_code_are_not_used(
    stages: Server, tmp_path: Path, stage: str, file: str, pieces: int
) -> None:
    assert stages.run("train", *CELL) == 0, stages.said()
    for name in ("dynat", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    process: dict[str, Any] = {
        "args": [sys.executable, "-m", f"stages.{stage}", *CELL],
        "cwd": stages.folder,
        "env": environment(stages.folder) | {"PYTHONPATH": str(tmp_path)},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(**process) as first:
        while_there_is(stages.folder, ".dvc/tmp/dynat/*/piece-*.pt")(first.pid)
    assert first.returncode == -signal.SIGKILL
    source = tmp_path / f"dynat/{file}.py"
    before = source.read_text(encoding="utf-8")
    source.write_text(before + "# another version\n", encoding="utf-8")
    changed = subprocess.run(**process, check=True)
    assert changed.stdout.count(f" {stage}: ") == pieces
    source.write_text(before, encoding="utf-8")
    unchanged = subprocess.run(**process, check=True)
    assert unchanged.stdout.count(f" {stage}: ") < pieces


@pytest.mark.parametrize("stage", ["attack", "autoattack"])
def test_an_evaluation_without_data_or_model_is_one_line(stages: Server, stage: str) -> None:
    assert stages.run(stage, *CELL) == 2
    assert stages.said().startswith("error: models/mini/pgd_at/0/target.safetensors: no such file")
    data = stages.folder / "data/mini.safetensors"
    data.rename(data.with_suffix(".away"))
    status, said = stages.run(stage, *CELL), stages.said()
    data.with_suffix(".away").rename(data)
    assert status == 2
    assert said.startswith("error: data/mini.safetensors: no such file")
    assert len(said.splitlines()) == 1
    assert not (stages.folder / ".dvc/tmp/dynat").exists() or not states(stages.folder)


def test_state_of_other_code_is_not_used(stages: Server, tmp_path: Path) -> None:
    for name in ("dynat", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    process: dict[str, Any] = {
        "args": [sys.executable, "-m", "stages.train", *CELL],
        "cwd": stages.folder,
        "env": environment(stages.folder) | {"PYTHONPATH": str(tmp_path)},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(**process) as first:
        while_there_is(stages.folder, SECOND_SAVE)(first.pid)
    assert first.returncode == -signal.SIGKILL
    source = tmp_path / "dynat/methods/step.py"
    before = source.read_text(encoding="utf-8")
    source.write_text(before + "# another version\n", encoding="utf-8")
    changed = subprocess.run(**process, check=True)
    assert "resumed" not in changed.stdout
    source.write_text(before, encoding="utf-8")
    unchanged = subprocess.run(**process, check=True)
    assert "resumed after epoch" in unchanged.stdout


def test_a_truncated_state_costs_one_epoch_and_is_named(stages: Server) -> None:
    expected = bytes_of(stages, *CELL)
    kill_after_second_save(stages)
    older, newest = states(stages.folder)
    os.truncate(newest, newest.stat().st_size // 2)
    number = int(older.stem.removeprefix("state-"))
    assert stages.run("train", *CELL) == 0
    assert f"{newest}: damaged (its SHA-256 does not fit); going back one generation" in stages.said()
    assert f"resumed after epoch {number - 1}\n" in stages.said()
    assert model(stages) == expected


def test_a_second_run_of_a_stage_is_refused_with_the_pid_of_the_first_and_harms_none(
    stages: Server,
) -> None:
    expected = bytes_of(stages, *CELL)

    def start_again(pid: int) -> None:
        while not list(stages.folder.glob(SECOND_SAVE)):
            assert running(pid)
        os.kill(pid, signal.SIGSTOP)
        with server(stages.folder, "second.log") as other:
            assert other.run("train", *CELL) == 2
            assert f"already runs as process {pid}; wait for it or stop it" in the_error(other.said())
        os.kill(pid, signal.SIGCONT)

    assert stages.run("train", *CELL, strike=start_again) == 0, stages.said()
    assert model(stages) == expected


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_autoattack_leaves_within_seconds_in_the_middle_of_a_piece(
    stages: Server, signum: signal.Signals, workers: int
) -> None:
    write_params(stages.folder, autoattack__n=[60], autoattack__batch=30, autoattack__workers=workers)
    assert stages.run("train", *CELL) == 0, stages.said()
    took: list[float] = []

    def stop(pid: int) -> None:
        while "apgd-ce" not in stages.said():
            assert running(pid)
            time.sleep(0.02)
        time.sleep(0.3)  # into the next piece, which takes many times that
        begun = time.monotonic()
        os.killpg(pid, signum)  # as a terminal does, and a scheduler
        while running(pid):
            time.sleep(0.01)
        took.append(time.monotonic() - begun)

    assert stages.run("autoattack", *CELL, strike=stop) == 75, stages.said()
    assert took[0] < 10  # seconds, on a machine that may be busy
    said = [line for line in stages.said().splitlines() if not line.startswith("mini pgd_at autoattack: ")]
    assert [line for line in said if "MLflow" not in line] == [
        "stopped; the finished chunks are kept for the next run"
    ]
    assert not (stages.folder / "metrics/autoattack").exists()
    assert any(file.name.startswith("piece-apgd-ce") for file in states(stages.folder))


def test_a_worker_of_a_killed_autoattack_is_gone_at_once(stages: Server) -> None:
    write_params(stages.folder, autoattack__n=[60], autoattack__batch=30, autoattack__workers=2)
    assert stages.run("train", *CELL) == 0, stages.said()
    workers: list[int] = []

    def strike(pid: int) -> None:
        while "apgd-ce" not in stages.said():
            assert running(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        workers.extend(int(child) for child in children if b"stage_server" in cmdline(child))
        kill(pid)

    assert stages.run("autoattack", *CELL, strike=strike) == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 5
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, workers))


def cmdline(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


# ------------------------------------------------------------------- losses, collapse, full and closed disks


def test_a_loss_that_explodes_names_the_last_good_state_and_publishes_nothing(stages: Server) -> None:
    assert stages.run("train", "mini", "explodes", "0") == 2
    line = the_error(stages.said())
    assert "the loss is not finite in epoch 3" in line
    newest = states(stages.folder)[-1]
    assert line.endswith(f"; the last good state is {newest}")
    assert newest.name == "state-00000003.pt"
    assert not (stages.folder / "models/mini/explodes").exists()


def test_a_target_that_stays_at_chance_is_given_up_in_one_line_and_not_published(stages: Server) -> None:
    write_params(stages.folder, train__epochs=30)
    assert stages.run("train", "mini", "learns_nothing", "0") == 2
    line = the_error(stages.said())
    assert "the target has collapsed" in line
    newest = states(stages.folder)[-1]
    assert line.endswith(f"; the last good state is {newest}")
    assert newest.name == "state-00000009.pt", "ten epochs at chance"
    assert not (stages.folder / "models/mini/learns_nothing").exists()


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
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a courier may still be in it


def test_a_disk_that_state_fills_up_costs_one_line_and_no_epoch_once_there_is_room(
    stages: Server,
) -> None:
    write_params(stages.folder, target={"name": "cnn", "width": 64, "depth": 1, "stem_stride": 2})
    expected = bytes_of(stages, *CELL)
    kill_after_second_save(stages)
    size = states(stages.folder)[-1].stat().st_size
    shutil.rmtree(states(stages.folder)[-1].parent)
    with small_disk(stages.folder / ".dvc/tmp/dynat", int(2.6 * size)) as remount:
        assert stages.run("train", *CELL) == 2
        line = the_error(stages.said())
        assert "free space on that disk and start again; the last good state is" in line
        newest = states(stages.folder)[-1]
        assert str(newest) in line
        assert not list(newest.parent.glob(".*.tmp"))
        assert model(stages) == {}
        remount(f"size={20 * size}")
        assert stages.run("train", *CELL) == 0, stages.said()
        assert f"resumed after epoch {int(newest.stem[-8:]) - 1}\n" in stages.said()
        assert model(stages) == expected


@pytest.mark.parametrize("options", ["size=4096", "ro"])
def test_a_full_or_read_only_disk_for_outputs_is_one_line_and_loses_no_epoch(
    stages: Server, options: str
) -> None:
    expected = bytes_of(stages, *CELL)
    with small_disk(stages.folder / "models", 4096) as remount:
        remount(options)
        assert stages.run("train", *CELL) == 2
        line = the_error(stages.said())
        assert str(Path("models", "mini")) in line
        assert ("read-only" if options == "ro" else "free space on that disk") in line
        assert model(stages) == {}
        remount("size=20m,rw")
        assert stages.run("train", *CELL) == 0, stages.said()
        assert "resumed after epoch 4\n" in stages.said()
        assert model(stages) == expected


def test_a_file_that_may_not_grow_is_one_line_and_nothing_half_written(stages: Server) -> None:
    assert stages.run("train", *CELL, largest_file=8000) == 2, stages.said()
    line = the_error(stages.said())
    assert "state-00000001.pt: File too large; check that disk; no earlier state was saved" in line
    assert states(stages.folder) == []
    assert model(stages) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_piece_of_autoattack_that_cannot_be_kept_is_one_line(stages: Server, workers: int) -> None:
    write_params(stages.folder, autoattack__workers=workers)
    assert stages.run("train", *CELL) == 0, stages.said()
    assert stages.run("autoattack", *CELL, largest_file=500) == 2
    line = the_error(stages.said())
    assert "File too large; check that disk; the parts finished before are kept in" in line
    assert not (stages.folder / "metrics/autoattack").exists()


@pytest.mark.parametrize("folder", ["models", "metrics"])
def test_a_file_in_place_of_an_output_folder_is_one_line(stages: Server, folder: str) -> None:
    if folder == "metrics":
        assert stages.run("train", *CELL) == 0, stages.said()
        shutil.rmtree(stages.folder / folder)
    (stages.folder / folder).write_text("not a folder")
    try:
        assert stages.run("train" if folder == "models" else "attack", *CELL) == 2
        assert folder in the_error(stages.said())
    finally:
        (stages.folder / folder).unlink()
