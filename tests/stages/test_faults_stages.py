"""What stops a stage costs one line and no finished work; resume state of anything else is never used."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stages_under_fire import (
    ROOT,
    Workspace,
    hashes,
    kill,
    resumed_after,
    running,
    small_disk,
    states,
    when,
    write_params,
)

pytestmark = pytest.mark.slow
CELL = ("mini", "pgd_at", "0")
Files = dict[str, str]  # name -> SHA-256


def trained_anew(stages: Workspace) -> Files:
    """Train in peace and return the hashes of the model folder, which is removed."""
    assert stages.run("train", *CELL) == 0, stages.said()
    outputs = stages.folder.joinpath("models", *CELL)
    found = hashes(outputs)
    shutil.rmtree(outputs)
    return found


def model(stages: Workspace) -> Files:
    return hashes(stages.folder.joinpath("models", *CELL))


def until(stages: Workspace, said: str) -> Callable[[int], None]:
    """Waits for what a stage says."""

    def wait(pid: int) -> None:
        while not re.search(said, stages.said(), re.MULTILINE):
            assert running(pid), stages.said()
            time.sleep(0.01)

    return wait


def kill_after_second_save(stages: Workspace) -> None:
    def strike(pid: int) -> None:
        until(stages, "^epoch 1 ")(pid)
        kill(pid)

    assert stages.run("train", *CELL, strike=strike) == -signal.SIGKILL, stages.said()


def test_asked_to_stop_a_training_saves_at_once_and_before_only_when_it_is_due(stages: Workspace) -> None:
    file = stages.folder / "params.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"save_minutes": 10}))
    saved: list[Path] = []

    def strike(pid: int) -> None:
        until(stages, "^epoch 1 ")(pid)
        saved.extend(states(stages.folder))
        os.kill(pid, signal.SIGTERM)

    assert stages.run("train", *CELL, strike=strike) == 75, stages.said()
    assert saved == []
    assert states(stages.folder) != []
    assert stages.run("train", *CELL) == 0, stages.said()
    assert resumed_after(stages.said()) >= 1


def the_error(said: str) -> str:
    """The only line that is about an error."""
    assert "Traceback" not in said
    (line,) = re.findall(r"^.*(?:error|Error).*$", said, re.MULTILINE)
    assert line.startswith("error: ")
    return line


# ---------------------------------------------------------------------------------------- the right state


def other_learning_rate(stages: Workspace) -> None:
    write_params(stages.folder, train__lr=0.07)


def other_data(stages: Workspace) -> None:
    write_params(stages.folder, data__split_seed=1)
    assert stages.run("prepare", "mini") == 0, stages.said()


def other_network(stages: Workspace) -> None:
    write_params(stages.folder, target={"name": "cnn", "width": 8, "depth": 1})


def as_before(stages: Workspace) -> None:
    write_params(stages.folder)
    assert stages.run("prepare", "mini") == 0, stages.said()


def test_state_of_other_parameters_or_data_is_not_used_and_kept_for_when_it_is_wanted(
    stages: Workspace, trained_files: Files
) -> None:
    kill_after_second_save(stages)
    (folder,) = {file.parent for file in states(stages.folder)}
    kept = states(stages.folder)
    for change in (other_learning_rate, other_data, other_network):
        change(stages)
        beside = trained_anew(stages)
        assert "resumed" not in stages.said()
        assert states(stages.folder) == kept
        away = folder.rename(stages.folder / "away")
        assert trained_anew(stages) == beside != trained_files
        away.rename(folder)
        as_before(stages)
    assert stages.run("train", *CELL) == 0, stages.said()
    assert resumed_after(stages.said()) >= 1
    assert model(stages) == trained_files


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[str], str]:
    """Makes a copy of the project with a line added to every module; returns its folder."""

    def edit(line: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in ("dynat", "stages"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            for path in (folder / name).rglob("*.py"):
                path.write_text(f"{path.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
        return str(folder)

    return edit


def test_state_of_other_code_is_not_used_and_a_comment_is_no_other_code(
    stages: Workspace, edited: Callable[[str], str]
) -> None:
    kill_after_second_save(stages)
    assert stages.run("train", *CELL, code=edited("ANOTHER = 'version'")) == 0, stages.said()
    assert "resumed" not in stages.said()
    assert stages.run("train", *CELL, code=edited("# another comment")) == 0, stages.said()
    assert resumed_after(stages.said()) >= 1


@pytest.mark.parametrize(("stage", "count"), [("attack", 7), ("autoattack", 8)])
def test_chunks_of_other_code_are_not_used_and_a_comment_is_no_other_code(
    trained: Workspace, edited: Callable[[str], str], stage: str, count: int
) -> None:
    strike = when(lambda: states(trained.folder))
    assert trained.run(stage, *CELL, strike=strike) == -signal.SIGKILL, trained.said()
    assert trained.run(stage, *CELL, code=edited("ANOTHER = 'version'")) == 0, trained.said()
    assert len(trained.chunks()) == count
    assert trained.run(stage, *CELL, code=edited("# another comment")) == 0, trained.said()
    assert len(trained.chunks()) < count


@pytest.mark.parametrize("stage", ["attack", "autoattack"])
def test_an_evaluation_without_data_or_model_is_one_line(stages: Workspace, stage: str) -> None:
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


def test_a_truncated_state_is_named_and_the_training_begins_anew(
    stages: Workspace, trained_files: Files
) -> None:
    kill_after_second_save(stages)
    (state,) = states(stages.folder)
    os.truncate(state, state.stat().st_size // 2)
    assert stages.run("train", *CELL) == 0
    assert f"{state}: damaged (its SHA-256 does not fit); computed again" in stages.said()
    assert "resumed" not in stages.said()
    assert model(stages) == trained_files


def test_a_second_run_of_a_stage_is_refused_with_the_pid_of_the_first_and_harms_none(
    stages: Workspace, trained_files: Files
) -> None:
    def start_again(pid: int) -> None:
        until(stages, "^epoch 1 ")(pid)
        os.kill(pid, signal.SIGSTOP)
        other = Workspace(stages.folder, stages.socket, "second.log")
        assert other.run("train", *CELL) == 2
        assert f"already runs as process {pid}; wait for it or stop it" in the_error(other.said())
        os.kill(pid, signal.SIGCONT)

    assert stages.run("train", *CELL, strike=start_again) == 0, stages.said()
    assert model(stages) == trained_files


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_autoattack_leaves_within_seconds_in_the_middle_of_a_chunk(
    trained: Workspace, signum: signal.Signals, workers: int
) -> None:
    write_params(trained.folder, autoattack__n=[60], autoattack__batch=30, autoattack__workers=workers)

    before: list[str] = []

    def stop(pid: int) -> None:
        until(trained, "apgd-ce")(pid)
        time.sleep(0.3)  # into the next chunk, which takes many times that
        os.killpg(pid, signal.SIGSTOP)
        before.extend(trained.chunks())
        os.killpg(pid, signum)  # as a terminal does, and a scheduler
        os.killpg(pid, signal.SIGCONT)

    assert trained.run("autoattack", *CELL, strike=stop) == 75, trained.said()
    said = [line for line in trained.said().splitlines() if not line.startswith("mini pgd_at autoattack: ")]
    assert [line for line in said if "MLflow" not in line] == [
        "stopped; the finished chunks are kept for the next run"
    ]
    assert len(trained.chunks()) <= len(before) + (0 if workers == 1 else 2) < 8, "it finished a chunk first"
    assert not (trained.folder / "metrics/autoattack").exists()
    assert any("apgd-ce" in file.name for file in states(trained.folder))


def test_a_worker_of_a_killed_autoattack_is_gone_at_once(trained: Workspace) -> None:
    write_params(trained.folder, autoattack__n=[60], autoattack__batch=30, autoattack__workers=2)
    workers: list[int] = []

    def strike(pid: int) -> None:
        until(trained, "apgd-ce")(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        workers.extend(int(child) for child in children)
        kill(pid)

    assert trained.run("autoattack", *CELL, strike=strike) == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 5
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, workers))


# ------------------------------------------------------------------- losses, collapse, full and closed disks


def test_a_loss_that_explodes_names_the_last_good_state_and_publishes_nothing(stages: Workspace) -> None:
    assert stages.run("train", "mini", "explodes", "0") == 2
    line = the_error(stages.said())
    assert "the loss is not finite in epoch 3" in line
    (state,) = states(stages.folder)
    assert line.endswith(f"; the last good state is in {state.parent}")
    assert not (stages.folder / "models/mini/explodes").exists()
    assert stages.run("train", "mini", "explodes", "0") == 2
    assert resumed_after(stages.said()) == 2


def test_a_target_that_stays_at_chance_is_given_up_in_one_line_and_not_published(stages: Workspace) -> None:
    write_params(stages.folder, train__epochs=30)
    assert stages.run("train", "mini", "learns_nothing", "0") == 2
    line = the_error(stages.said())
    assert "the target has collapsed" in line
    (state,) = states(stages.folder)
    assert line.endswith(f"; the last good state is in {state.parent}")
    assert re.findall(r"^epoch (\d+) ", stages.said(), re.MULTILINE) == [str(n) for n in range(9)], (
        "the tenth epoch at chance is the last"
    )
    assert not (stages.folder / "models/mini/learns_nothing").exists()


def test_a_disk_that_state_fills_up_costs_one_line_and_no_epoch_once_there_is_room(
    stages: Workspace,
) -> None:
    write_params(stages.folder, target={"name": "cnn", "width": 64, "depth": 1, "stem_stride": 2})
    expected = trained_anew(stages)
    kill_after_second_save(stages)
    (state,) = states(stages.folder)
    size = state.stat().st_size
    shutil.rmtree(state.parent)
    with small_disk(stages.folder / ".dvc/tmp/dynat", int(1.6 * size)) as remount:  # not for two of them
        assert stages.run("train", *CELL) == 2
        line = the_error(stages.said())
        assert f"free space on that disk and start again; the last good state is in {state.parent}" in line
        assert states(stages.folder) == [state]
        assert not list(state.parent.glob(".*.tmp"))
        assert model(stages) == {}
        remount(f"size={20 * size}")
        assert stages.run("train", *CELL) == 0, stages.said()
        assert "resumed in epoch 0, after 1 of" in stages.said()
        assert model(stages) == expected


@pytest.mark.parametrize("options", ["size=4096", "ro"])
def test_a_full_or_read_only_disk_for_outputs_is_one_line_and_loses_no_epoch(
    stages: Workspace, trained_files: Files, options: str
) -> None:
    with small_disk(stages.folder / "models", 4096) as remount:
        remount(options)
        assert stages.run("train", *CELL) == 2
        line = the_error(stages.said())
        assert str(Path("models", "mini")) in line
        assert ("Read-only" if options == "ro" else "free space on that disk") in line
        assert model(stages) == {}
        remount("size=20m,rw")
        assert stages.run("train", *CELL) == 0, stages.said()
        assert resumed_after(stages.said()) == 4
        assert model(stages) == trained_files


def test_a_file_that_may_not_grow_is_one_line_and_nothing_half_written(stages: Workspace) -> None:
    assert stages.run("train", *CELL, largest_file=8000) == 2, stages.said()
    line = the_error(stages.said())
    assert "state.pt: File too large; check that disk; no earlier state was saved" in line
    assert states(stages.folder) == []
    assert model(stages) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chunk_of_autoattack_that_cannot_be_kept_is_one_line(trained: Workspace, workers: int) -> None:
    write_params(trained.folder, autoattack__workers=workers)
    assert trained.run("autoattack", *CELL, largest_file=500) == 2
    line = the_error(trained.said())
    assert "File too large; check that disk; no earlier state was saved" in line
    assert not (trained.folder / "metrics/autoattack").exists()


@pytest.mark.parametrize("folder", ["models", "metrics"])
def test_a_file_in_place_of_an_output_folder_is_one_line(stages: Workspace, folder: str) -> None:
    if folder == "metrics":
        assert stages.run("train", *CELL) == 0, stages.said()
        shutil.rmtree(stages.folder / folder)
    (stages.folder / folder).write_text("not a folder")
    try:
        assert stages.run("train" if folder == "models" else "attack", *CELL) == 2
        assert folder in the_error(stages.said())
    finally:
        (stages.folder / folder).unlink()
