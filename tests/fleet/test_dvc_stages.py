"""DVC's internals as the fleet uses them: its plan, its run cache, its lock file."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import dvc.dvcfile
import dvc.output
import dvc.repo.reproduce
import dvc.repo.stage
import dvc.rwlock
import dvc.stage
import dvc.stage.cache
import dvc.utils.serialize
import pytest
from fleets import begun, committed, repository
from pipelines import dvc as run_dvc

from dynat.errors import UserError
from dynat.fleet import supervisor
from dynat.fleet.dvc_stages import Pipeline, StageFiles, key_of
from dynat.fleet.worker import Job, environment_of_driver, finished, run_stage

USED = {  # what dvc_stages.py calls, with the parameters that it gives
    dvc.repo.reproduce.plan_repro: ["graph", "stages"],
    dvc.repo.reproduce.collect_stages: ["repo", "targets"],
    dvc.repo.reproduce.get_active_graph: ["graph"],
    dvc.rwlock.rwlock: ["tmp_dir", "fs", "cmd", "read", "write", "hardlink"],
    dvc.stage.cache.StageCache.restore: ["self", "stage", "dry"],
    dvc.stage.cache.StageCache.save: ["self", "stage"],
    dvc.dvcfile.ProjectFile.dump_stages: ["stages", "update_pipeline"],
    dvc.output.Output.commit: ["relink"],
    dvc.repo.lock_repo: ["repo"],
    dvc.repo.stage.StageLoad.collect: ["target"],
    dvc.stage.PipelineStage.changed: ["upstream"],
    dvc.stage.PipelineStage.changed_stage: ["self"],
    dvc.stage.PipelineStage.deps_cached: ["self"],
    dvc.stage.PipelineStage.save_deps: ["self"],
    dvc.stage.PipelineStage.save_outs: ["self"],
    dvc.stage.PipelineStage.remove_outs: [],
    dvc.stage.PipelineStage.commit: [],
    dvc.utils.serialize.modify_yaml: ["path"],
}


@pytest.mark.parametrize("used", USED, ids=lambda used: used.__qualname__)
def test_dvc_has_what_the_fleet_uses_of_it(used: object) -> None:
    assert callable(used)
    has = inspect.signature(used).parameters
    missing = [name for name in USED[used] if name not in has]  # type: ignore[index]
    assert missing == [], f"DVC {dvc.__version__} changed {used}: adapt dynat/fleet/dvc_stages.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = repository(tmp_path / "r", seconds=0.1, wide=2)
    monkeypatch.chdir(made)
    return made


def do(pipeline: Pipeline, name: str) -> str:
    """What the driver and a worker do with one stage, without Ray."""
    state = pipeline.state(name)
    if state == "to run":
        planned = pipeline.begin(name, done=False)
        files = StageFiles.open(pipeline.root, name)
        assert files.dependencies() == planned
        assert not files.cached()
        subprocess.run([sys.executable, *files.command.split()[1:]], check=True)
        files.save()
    if state != "unchanged":
        assert pipeline.record([name]) == {}
    return state


def test_the_lock_file_and_the_outputs_are_those_of_dvc_repro(folder: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(folder, [])
    order = sorted(pipeline.stages, key=lambda name: (len(name), name), reverse=True)
    while order:  # another order than the plan's
        name = next(each for each in order if not pipeline.upstream[each] & set(order))
        assert do(pipeline, name) == "to run"
        order.remove(name)
    pipeline.sort_lock()
    other = repository(tmp_path / "serial", seconds=0.1, wide=2)
    assert run_dvc(other, "repro").returncode == 0
    assert committed(folder) == committed(other)
    assert "up to date" in run_dvc(folder, "repro").stdout


def test_an_edit_is_not_answered_with_the_outputs_in_the_lock_file(folder: Path) -> None:
    assert run_dvc(folder, "repro").returncode == 0
    before = (folder / "out/first").read_text()
    (folder / "input").write_text("2")
    assert do(Pipeline(folder, ["first"]), "first") == "to run"
    assert (folder / "out/first").read_text() != before
    (folder / "input").write_text("1")
    assert do(Pipeline(folder, ["first"]), "first") == "cached"
    assert (folder / "out/first").read_text() == before
    assert begun(folder, "first") == 2


def test_what_the_lock_file_names_is_no_run_at_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_dvc(folder, "repro", "first").returncode == 0
    pipeline = Pipeline(folder, ["first"])
    shutil.rmtree(folder / ".dvc/cache/runs")  # the output is in the cache, as one of another stage may be
    planned = pipeline.begin("first", done=False)
    monkeypatch.chdir(folder)
    job = Job(folder, "first", planned, environment_of_driver(), 0, 1, folder / ".dvc/tmp/stop")
    assert run_stage(job).ended == "done"
    assert pipeline.record(["first"]) == {}
    assert begun(folder, "first") == 2


def test_locks_that_dvc_on_another_machine_removed_cost_nothing(folder: Path) -> None:
    pipeline = Pipeline(folder, ["first"])
    pipeline.begin("first", done=False)
    (folder / ".dvc/tmp/rwlock").write_text("{}")
    pipeline.release("first")


def test_dvc_repro_restores_everything_from_the_run_cache(folder: Path) -> None:
    pipeline = Pipeline(folder, [])
    for name in pipeline.stages:
        do(pipeline, name)
    pipeline.sort_lock()
    before, runs = committed(folder), begun(folder, "a2")
    (folder / "dvc.lock").unlink()
    for file in (folder / "out").iterdir():
        file.unlink()
    assert run_dvc(folder, "repro").returncode == 0
    assert committed(folder) == before
    assert begun(folder, "a2") == runs, "an output that DVC does not cache was made again"


def test_dvc_repro_of_a_stage_under_way_is_refused(folder: Path) -> None:
    pipeline = Pipeline(folder, ["first"])
    pipeline.begin("first", done=False)
    beside = run_dvc(folder, "repro", "first")
    assert beside.returncode != 0
    assert f"PID {os.getpid()}" in beside.stderr
    pipeline.release("first")
    assert run_dvc(folder, "repro", "first").returncode == 0


def test_a_finished_command_is_known_until_its_outputs_or_dependencies_change(folder: Path) -> None:
    files = StageFiles.open(folder, "first")
    planned, result = files.dependencies(), folder / "result"
    (folder / "out").mkdir()
    (folder / "out/first").write_text("made")
    hashes = {"out/first": supervisor.sha256(folder / "out/first")}
    supervisor.write(result, {"key": key_of(planned), "status": 0, "outputs": hashes})
    assert finished(files, planned, result)
    assert not finished(files, {**planned, "input": "other"}, result)
    (folder / "out/first").write_text("edited")
    assert not finished(files, planned, result)


def test_a_target_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="nothing_like_it"):
        Pipeline(folder, ["nothing_like_it"])
