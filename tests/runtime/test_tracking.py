"""What a stage tells its tracker arrives in MLflow once, whatever dies, and costs one line at most."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from dynat.runtime import courier
from dynat.runtime.tracking import Tracker, spool_folder

PATIENCE = 300  # s; the courier imports MLflow beside whatever else this machine does
STAGE = """
import sys, time
from dynat.tracking import Tracker
experiment, name, token, steps, then = sys.argv[1:]
tracker = Tracker(experiment, name, {}, {})
if token:
    tracker.begin(token)
for step in range(int(steps)):
    tracker.metrics(step, {"loss": step / 8, "accuracy": step})
print("told", flush=True)
if then == "wait":
    time.sleep(600)
tracker.finish(timeout=300)
assert "mlflow" not in sys.modules
"""


def start(*arguments: object) -> "subprocess.Popen[str]":
    """A stage in a session of its own, like one under a terminal or a queue worker."""
    command = [sys.executable, "-c", STAGE, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def kill_once_told(stage: "subprocess.Popen[str]") -> None:
    with stage:
        assert stage.stdout is not None
        assert stage.stdout.readline() == "told\n"
        os.killpg(stage.pid, signal.SIGKILL)


def eventually(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return value


def delivered() -> bool:
    return not list(spool_folder().glob("*.jsonl"))


def courier_is_gone() -> bool:
    return not courier._held(spool_folder() / "lock")


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path, experiment: str) -> list[Any]:
    store = client(root)
    found = store.get_experiment_by_name(experiment)
    return list(store.search_runs([found.experiment_id])) if found else []


def history(root: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((each.step, each.value) for each in client(root).get_metric_history(run_id, key))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository whose courier serves one test after the other."""
    root = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        yield root


# Without MLflow


def test_a_broken_store_costs_one_line_and_keeps_what_was_told(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "mlflow.db").write_text("this is no database " * 100)
    tracker = Tracker("digits", "dynat-0", {}, {"alpha": 1})
    for step in range(20):
        tracker.metrics(step, {"loss": 1.0})
        time.sleep(0.1)
    assert tracker.finish(timeout=PATIENCE) is None
    assert re.fullmatch(
        r"warning: MLflow at sqlite:.*not a database; the stage goes on.*\n", capsys.readouterr().err
    )
    assert (fresh / "mlflow.db").read_text().startswith("this is no database")
    time.sleep(1)
    (spool,) = spool_folder().glob("*.jsonl")
    assert spool.read_text().count('"loss"') == 20


def test_a_repository_that_cannot_be_written_costs_one_line(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("DVC_ROOT", str(fresh / "file"))
    tracker = Tracker("digits", "dynat-0", {}, {})
    tracker.begin("token")
    tracker.metrics(0, {"loss": 1.0})
    assert tracker.run_id is None
    assert tracker.finish() is None
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_told_costs_one_line(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fresh / "mlflow.db").write_text("this is no database " * 100)
    endless: dict[str, Any] = {}
    endless["again"] = endless
    tracker = Tracker("digits", "dynat-0", {}, endless)
    tracker.metrics(0, {"loss": "low"})  # type: ignore[dict-item]
    tracker.finish(timeout=1)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_password_in_the_uri_is_not_shown(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setattr("dynat.runtime.tracking._call_courier", lambda: None)
    assert Tracker("digits", "dynat-0", {}, {}).finish(timeout=0.1) is None
    error = capsys.readouterr().err
    assert "127.0.0.1:9" in error
    assert "secret" not in error


def test_telling_takes_less_than_a_millisecond(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dynat.runtime.tracking._call_courier", lambda: None)
    tracker = Tracker("digits", "dynat-0", {}, {})
    times = []
    for step in range(500):
        began = time.perf_counter()
        tracker.metrics(step, {f"metric{i}": 1 / 3 for i in range(20)})
        times.append(time.perf_counter() - began)
    assert sorted(times)[250] < 1e-3
    tracker.finish(timeout=0)  # as a stage does that was told to stop
    assert capsys.readouterr().err == ""


def test_spool_files_that_a_power_failure_cut_are_dropped(fresh: Path) -> None:
    spool_folder().mkdir(parents=True)
    for name, content in {"a": "", "b": '{"uri": "sqli', "c": "{}\n"}.items():
        (spool_folder() / f"{name}.jsonl").write_text(content)
    courier._deliver({}, {})
    assert delivered()


# With MLflow


@pytest.mark.slow
def test_a_stage_is_a_run_with_params_tags_and_metrics(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train_dynat@digits-dynat-0")
    monkeypatch.setenv("DVC_EXP_NAME", "sunny-axe")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "3f9c")
    params = {
        "epsilon": "8/255",
        "inner": {"steps": 10, "start": None, "stop": {"tau": 0.5}},
        "milestones": [75, 90],
        "path": Path("data"),
        "long": "x" * 10_000,
        "odd (key)": True,
        **{f"p{number}": number for number in range(250)},
    }
    tracker = Tracker("digits", "dynat-0", {"stage": "train"}, params)
    tracker.metrics(0, {"loss": 0.5})
    tracker.metrics(1, {"loss": 1 / 3})
    tracker.tags({"model.sha256": "ab12"})
    run_id = tracker.finish(timeout=PATIENCE)
    (run,) = runs(shared, "digits")
    assert run.info.run_id == run_id == tracker.run_id
    assert (run.info.run_name, run.info.status) == ("dynat-0", "FINISHED")
    assert run.info.artifact_uri.startswith((shared / "mlartifacts").as_uri())
    expected = {"epsilon": "8/255", "inner.steps": "10", "inner.start": "null", "inner.stop.tau": "0.5"}
    expected |= {"milestones": "[75, 90]", "path": "data", "long": "x" * 6000, "odd _key_": "true"}
    assert run.data.params == expected | {f"p{number}": str(number) for number in range(250)}
    tags = {"stage": "train", "dvc.stage": "train_dynat@digits-dynat-0", "dvc.exp_name": "sunny-axe"}
    assert run.data.tags.items() >= (tags | {"dvc.baseline_rev": "3f9c", "model.sha256": "ab12"}).items()
    assert history(shared, run_id or "", "loss") == [(0, 0.5), (1, 1 / 3)]
    assert not (shared / "mlruns").exists()


@pytest.mark.slow
def test_a_stage_that_was_killed_leaves_a_run_as_killed_with_all_it_told(shared: Path) -> None:
    kill_once_told(start("killed", "a", "", 5, "wait"))
    assert eventually(delivered)
    (run,) = runs(shared, "killed")
    assert run.info.status == "KILLED"
    assert history(shared, run.info.run_id, "loss") == [(step, step / 8) for step in range(5)]


@pytest.mark.slow
def test_a_resumed_stage_goes_on_with_its_run_and_repeats_no_step(shared: Path) -> None:
    kill_once_told(start("resumed", "a", "token-a", 3, "wait"))
    kill_once_told(
        start("resumed", "a", "token-a", 5, "wait")
    )  # at once: the courier may not know of either yet
    with start("resumed", "a", "token-a", 7, "finish") as stage:
        assert stage.wait() == 0
    with start("resumed", "a", "token-b", 2, "finish") as stage:
        assert stage.wait() == 0
    assert eventually(delivered)
    other, run = runs(shared, "resumed")  # the newest first
    assert (run.info.status, other.info.status) == ("FINISHED", "FINISHED")
    assert history(shared, run.info.run_id, "loss") == [(step, step / 8) for step in range(7)]
    assert history(shared, run.info.run_id, "accuracy") == [(step, step) for step in range(7)]
    assert len(history(shared, other.info.run_id, "loss")) == 2


@pytest.mark.slow
def test_a_stage_that_fails_before_it_begins_leaves_no_run(shared: Path) -> None:
    kill_once_told(start("nothing", "a", "", 0, "wait"))
    assert eventually(delivered)
    assert runs(shared, "nothing") == []


@pytest.mark.slow
def test_a_killed_courier_loses_and_doubles_nothing(fresh: Path) -> None:
    tracker = Tracker("digits", "a", {}, {"alpha": 1})
    tracker.metrics(0, {"loss": 0.0})
    assert eventually(lambda: tracker.run_id)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"DVC_ROOT={fresh}\0".encode() in (process / "environ").read_bytes()
            if ours and b"dynat.runtime.courier" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    assert eventually(courier_is_gone)
    tracker.metrics(1, {"loss": 0.5})
    run_id = tracker.finish(timeout=PATIENCE)
    (run,) = runs(fresh, "digits")
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert history(fresh, run.info.run_id, "loss") == [(0, 0.0), (1, 0.5)]


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_one_line_in_bounded_time(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = Tracker("digits", "a", {}, {})
    tracker.metrics(0, {"loss": 0.0})
    assert tracker.finish(timeout=PATIENCE) is None
    assert re.fullmatch(
        r"warning: MLflow at http://127\.0\.0\.1:9: .*Connection.*\n", capsys.readouterr().err
    )


@pytest.mark.slow
def test_what_a_locked_store_refuses_is_delivered_when_it_opens(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(fresh / "mlflow.db", isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        first = Tracker("digits", "a", {}, {})
        first.metrics(0, {"loss": 0.5})
        assert first.finish(timeout=PATIENCE) is None
        assert re.fullmatch(r"warning: .*locked; the stage goes on.*\n", capsys.readouterr().err)
        lock.execute("ROLLBACK")
    assert eventually(delivered)
    (run,) = runs(fresh, "digits")
    assert run.info.status == "FINISHED"
    assert history(fresh, run.info.run_id, "loss") == [(0, 0.5)]


@pytest.mark.slow
def test_stages_of_two_repositories_that_create_one_store_together_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    stages = []
    for name in range(4):
        (tmp_path / str(name % 2)).mkdir(exist_ok=True)
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / str(name % 2)))
        stages.append(start("digits", name, "", 10, "finish"))
    for stage in stages:
        with stage:
            assert stage.wait() == 0
    found = {run.info.run_name: run for run in runs(tmp_path, "digits")}
    assert sorted(found) == ["0", "1", "2", "3"]
    for run in found.values():
        assert run.info.status == "FINISHED"
        assert history(tmp_path, run.info.run_id, "loss") == [(step, step / 8) for step in range(10)]


@pytest.mark.slow
def test_a_store_of_an_older_mlflow_is_upgraded_and_a_copy_of_it_kept(fresh: Path) -> None:
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    def version(name: str) -> str:
        with closing(sqlite3.connect(fresh / name)) as database:
            return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])

    uri = f"sqlite:///{fresh / 'mlflow.db'}"
    Base.metadata.create_all(create_engine(uri))
    command.upgrade(_get_alembic_config(uri), "head-1")
    old = version("mlflow.db")
    run_id = Tracker("digits", "a", {}, {}).finish(timeout=PATIENCE)
    assert [run.info.run_id for run in runs(fresh, "digits")] == [run_id]
    assert version(f"mlflow.db.{old}.bak") == old != version("mlflow.db")


@pytest.mark.slow
def test_the_courier_leaves_within_a_minute_of_the_last_stage(fresh: Path) -> None:
    (fresh / "mlflow.db").write_text("this is no database " * 100)
    Tracker("digits", "a", {}, {}).finish(timeout=PATIENCE)
    began = time.monotonic()
    assert not courier_is_gone()
    assert eventually(courier_is_gone)
    assert time.monotonic() - began < 60
