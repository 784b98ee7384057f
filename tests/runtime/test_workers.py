"""Work shared by processes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest

from dynat.errors import UserError
from dynat.runtime.workers import Say, allowed, share


def write(path: Path, say: Say) -> None:
    path.write_text("done")
    say(path.name)


def test_a_fleet_leaves_a_stage_fewer_workers_and_never_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNAT_WORKERS", raising=False)
    assert allowed(3) == 3
    monkeypatch.setenv("DYNAT_WORKERS", "2")
    assert [allowed(each) for each in (1, 2, 3)] == [1, 2, 2]


def test_all_work_is_done_and_heard_of(tmp_path: Path) -> None:
    heard: list[str] = []
    names = [f"piece{i}" for i in range(7)]
    assert share([partial(write, tmp_path / name) for name in names], 3, heard.append, lambda: False)
    assert sorted(heard) == names == sorted(path.name for path in tmp_path.iterdir())


def test_a_stop_ends_the_processes_at_once() -> None:
    begun = time.monotonic()
    assert not share([lambda say: time.sleep(60)] * 2, 2, lambda _: None, lambda: True)
    assert time.monotonic() - begun < 30
    assert not active_children()


def test_a_failing_process_is_not_passed_over() -> None:
    def fail(say: Say) -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        share([fail], 1, lambda _: None, lambda: False)


def test_a_fault_that_the_user_can_mend_is_passed_on_and_ends_the_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(say: Say) -> None:
        raise UserError("disk: full; free some space")

    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^disk: full; free some space$"):
        share([fail, lambda say: time.sleep(60)], 2, lambda _: None, lambda: False)
    assert time.monotonic() - begun < 30
    assert capfd.readouterr().err == ""


def test_a_process_that_the_system_kills_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^a worker process was killed; start again"):
        share([lambda say: os.kill(os.getpid(), signal.SIGKILL)], 1, lambda _: None, lambda: False)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_left_to_the_parent(signum: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(say: Say) -> None:
        os.kill(os.getpid(), signum)
        say("still there")

    heard: list[str] = []
    assert share([interrupted], 1, heard.append, lambda: False)
    assert heard == ["still there"]
    assert capfd.readouterr().err == ""


PARENT = """
import os, time
from dynat.runtime.workers import share
share([lambda say: (say(str(os.getpid())), time.sleep(60))] * 2, 2, lambda pid: print(pid, flush=True), bool)
"""


def test_processes_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
