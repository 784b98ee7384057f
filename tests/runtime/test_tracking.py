"""What a stage tells its tracker is in MLflow once, whatever dies, and costs one line at most."""

import http.server
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from dynat.errors import UserError
from dynat.runtime import tracking
from dynat.runtime.tracking import Tracker, log_later, unlogged

pytestmark = pytest.mark.slow  # imports MLflow
SEVEN = [{"epoch": epoch, "loss": epoch / 8, "accuracy": float(epoch)} for epoch in range(7)]
STAGE = """
import sys, threading, time
from dynat.runtime.tracking import Tracker
experiment, name, steps, then = sys.argv[1:]
tracker = Tracker(experiment, name, {"stage": "train"}, {})
tracker.begin(name)
for step in range(int(steps)):
    tracker.metrics({"epoch": step, "loss": step / 8, "accuracy": float(step)})
while then == "wait":
    print("going on", flush=True)
    time.sleep(0.2)
assert tracker.finish()
assert not [thread for thread in threading.enumerate() if thread.name == "mlflow"]
"""


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", STAGE, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def eventually(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking.tracking_uri())


def runs(experiment: str) -> list[Any]:
    store = client()
    found = store.get_experiment_by_name(experiment)
    return list(store.search_runs([found.experiment_id])) if found else []


def points(run_id: str | None, key: str) -> list[tuple[int, float]]:
    return sorted((each.step, each.value) for each in client().get_metric_history(run_id, key))


def database() -> Path:
    return tracking.root() / "mlflow.db"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow makes it, which takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking._open_store("Default")
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with an empty store."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def track(status: str = "FINISHED", token: str = "token") -> str | None:
    """One stage from its beginning to its end."""
    tracker = Tracker("digits", "dynat-0", {"stage": "train"}, {"alpha": 1})
    tracker.begin(token)
    for row in SEVEN:
        tracker.metrics({"epoch": row["epoch"], "loss": row["loss"]})
    return tracker.finish(status)


# -------------------------------------------------------------------------------------------- what arrives


def test_a_stage_is_a_run_with_params_tags_and_metrics(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train_dynat@digits-dynat-0")
    monkeypatch.setenv("DVC_EXP_NAME", "sunny-axe")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "3f9c")
    params = {
        "epsilon": "8/255",
        "inner": {"steps": 10, "start": None, "stop": {"tau": 0.5}},
        "drops": {75: 0.1},
        "milestones": [75, 90],
        "path": Path("data"),
        "compile": True,
    }
    tracker = Tracker("digits", "dynat-0", {"stage": "train"}, params)
    tracker.begin("token")
    tracker.metrics({"loss": 0.5})
    tracker.metrics({"epoch": 1, "loss": 1 / 3})
    tracker.tags({"model.sha256": "ab12"})
    run_id = tracker.finish()
    (run,) = runs("digits")
    assert run.info.run_id == run_id
    assert (run.info.run_name, run.info.status) == ("dynat-0", "FINISHED")
    assert run.info.artifact_uri.startswith((repository / "mlartifacts").as_uri())
    expected = {"epsilon": "8/255", "inner.steps": "10", "inner.start": "null", "inner.stop.tau": "0.5"}
    expected |= {"milestones": "[75, 90]", "path": '"data"', "compile": "true", "drops.75": "0.1"}
    assert run.data.params == expected
    tags = {"stage": "train", "dvc.stage": "train_dynat@digits-dynat-0", "dvc.exp_name": "sunny-axe"}
    assert run.data.tags.items() >= (tags | {"dvc.baseline_rev": "3f9c", "model.sha256": "ab12"}).items()
    assert points(run_id, "loss") == [(0, 0.5), (1, 1 / 3)]
    assert not (repository / "mlruns").exists()
    assert not unlogged().exists()
    assert capfd.readouterr() == ("", "")


def test_a_stage_that_fails_before_it_begins_leaves_no_run() -> None:
    with pytest.raises(ValueError, match="bad"), Tracker("digits", "dynat-0", {}, {}):
        raise ValueError("bad")
    assert runs("digits") == []


def test_an_error_ends_the_run_as_failed() -> None:
    def fail(tracker: Tracker) -> None:
        with tracker:
            tracker.begin("token")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail(Tracker("digits", "dynat-0", {}, {}))
    assert [run.info.status for run in runs("digits")] == ["FAILED"]


def test_a_killed_stage_goes_on_with_its_run_and_no_point_is_there_twice() -> None:
    with start("digits", "token", 3, "wait") as stage:
        assert stage.stdout is not None
        assert stage.stdout.readline() == "going on\n"
        assert eventually(
            lambda: [run for run in runs("digits") if len(points(run.info.run_id, "loss")) == 3]
        )
        os.killpg(stage.pid, signal.SIGKILL)
    tracker = Tracker("digits", "token", {}, {})
    tracker.begin("token", SEVEN[:5])  # epochs 3 and 4 were in the resume state, but not yet in the store
    for row in SEVEN[5:]:
        tracker.metrics(row)
    run_id = tracker.finish()
    (run,) = runs("digits")
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    for key in ("loss", "accuracy"):
        assert points(run_id, key) == [(row["epoch"], row[key]) for row in SEVEN]
    assert track(token="another") != run_id


def test_stages_that_create_one_store_together_lose_nothing() -> None:
    database().unlink()
    stages = [start("digits", name, 10, "finish") for name in range(2)]
    for stage in stages:
        with stage:
            assert stage.wait() == 0
    assert sorted(run.info.run_name for run in runs("digits")) == ["0", "1"]
    for run in runs("digits"):
        assert run.info.status == "FINISHED"
        assert points(run.info.run_id, "loss") == [(step, step / 8) for step in range(10)]


# ----------------------------------------------------------------------------------- stores that do not work


def the_warning(said: str) -> str:
    """The only line that the stage has printed."""
    (line,) = said.splitlines()
    assert line.startswith("warning: MLflow at ")
    assert line.endswith(f"; the stage goes on, {tracking.COMMAND} logs the rest later")
    return line


@contextmanager
def broken() -> Iterator[str]:
    sound = database().read_bytes()
    database().write_text("this is no database " * 100)
    yield "file is not a database"
    assert database().read_text().startswith("this is no database")
    database().write_bytes(sound)


@contextmanager
def locked() -> Iterator[str]:
    with closing(sqlite3.connect(database(), isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        yield "database is locked"
        lock.execute("ROLLBACK")


@contextmanager
def deleted() -> Iterator[str]:
    store = client()
    number = store.create_experiment("digits")
    store.delete_experiment(number)
    yield (
        f"has been deleted; restore it (mlflow experiments restore --experiment-id {number}) or remove it "
        f"for good (mlflow gc --experiment-ids {number})"
    )
    store.restore_experiment(number)


@contextmanager
def outdated() -> Iterator[str]:
    with closing(sqlite3.connect(database(), isolation_level=None)) as store:
        (version,) = store.execute("SELECT version_num FROM alembic_version").fetchone()
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        yield (
            "Take a backup of your database, then run 'mlflow db upgrade <database_uri>' to migrate your "
            "database to the latest schema. NOTE: schema migration may result in database downtime - please "
            "consult your database's documentation for more detail."
        )
        store.execute("UPDATE alembic_version SET version_num = ?", (version,))


@pytest.mark.parametrize("store", [broken, locked, deleted, outdated])
def test_a_store_that_fails_costs_one_line_with_the_remedy_and_a_command_logs_what_it_lacks(
    store: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "LOCKED_S", 0.2)
    with store() as remedy:
        assert track() is None
        assert remedy in the_warning(capfd.readouterr().err)
        with pytest.raises(UserError, match=r"^MLflow at sqlite:.*token\.json is kept$"):
            log_later()
    log_later()
    assert "digits dynat-0: logged as " in capfd.readouterr().out
    (run,) = runs("digits")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"alpha": "1"}
    assert points(run.info.run_id, "loss") == [(row["epoch"], row["loss"]) for row in SEVEN]
    assert list(unlogged().iterdir()) == []


def test_a_store_that_recovers_gets_all_within_the_stage(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "LOCKED_S", 0.2)
    tracker = Tracker("digits", "dynat-0", {}, {})
    with locked():
        tracker.begin("token", SEVEN[:3])
        assert eventually(lambda: tracker._warned)
    for row in SEVEN[3:]:
        tracker.metrics(row)
    run_id = tracker.finish()
    assert points(run_id, "loss") == [(row["epoch"], row["loss"]) for row in SEVEN]
    the_warning(capfd.readouterr().err)
    assert not unlogged().exists()


def test_a_store_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.3)
    go_on = threading.Event()
    monkeypatch.setattr(tracking, "_open_store", lambda experiment: go_on.wait())
    begun = time.monotonic()
    assert track() is None
    assert time.monotonic() - begun < 5
    assert "does not answer" in the_warning(capfd.readouterr().err)
    assert (unlogged() / "token.json").exists()
    go_on.set()


def test_the_file_of_an_earlier_start_goes_once_its_run_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOCKED_S", 0.2)
    with locked():
        track("FAILED")
    assert (unlogged() / "token.json").exists()
    assert track() is not None
    assert list(unlogged().iterdir()) == []


def test_nothing_can_be_written_and_the_stage_goes_on(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(repository / "mlflow.db"))  # a file
    assert track() is None
    the_warning(capfd.readouterr().err)


# -------------------------------------------------------------------------------------------- servers


class Refuse(http.server.BaseHTTPRequestHandler):
    """Notes what it is sent and refuses it in many words."""

    seen: list[str | None] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers["Authorization"])
        body = json.dumps({"error_code": "PERMISSION_DENIED", "message": "words " * 200 + "and the remedy"})
        self.send_response(403)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_credentials_are_the_stages_own_and_no_remedy_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "lovelace")
        assert track() is None
        server.shutdown()
    assert set(Refuse.seen) == {"Basic YWRhOmxvdmVsYWNl"}
    assert "words and the remedy; the stage" in the_warning(capfd.readouterr().err)


def test_a_dead_server_costs_one_line_in_bounded_time_and_no_password(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secr@et@127.0.0.1:9")
    begun = time.monotonic()
    assert track() is None
    assert time.monotonic() - begun < 30
    line = the_warning(capfd.readouterr().err)
    assert re.search(r"127\.0\.0\.1:9: .*(Connection|connection)", line)
    assert "secr" not in line
    assert "et@" not in line


# ----------------------------------------------------------------------------------------- the stage's work


def test_telling_takes_less_than_a_millisecond() -> None:
    tracker = Tracker("digits", "dynat-0", {}, {})
    tracker.begin("token")
    times = []
    for step in range(50):
        began = time.perf_counter()
        tracker.metrics({"epoch": step, **{f"metric{i}": 1 / 3 for i in range(20)}})
        times.append(time.perf_counter() - began)
    assert sorted(times)[25] < 1e-3
    tracker.finish()
