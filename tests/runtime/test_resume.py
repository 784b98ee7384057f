"""Resume state: killed at any moment, damaged, or wanted by two, it is right or absent."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynat.errors import UserError
from dynat.runtime.resume import ResumeStore

CALLS = {"open", "listdir", "mkdir", "remove", "rename", "rmdir", "scandir", "truncate"}  # audited by Python
# The children below run little Python and end in os._exit, so forking beside torch's threads is safe.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
Action = Callable[[], None]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def full(step: int) -> dict[str, Any]:
    return {"step": step, "weights": [{"w": torch.full((257,), float(step))}], "name": "α", "none": None}


def assert_is(state: dict[str, Any] | None, step: int) -> None:
    assert state is not None
    assert (state["step"], state["name"], state["none"]) == (step, "α", None)
    assert torch.equal(state["weights"][0]["w"], torch.full((257,), float(step)))


def in_child(work: Action) -> int:
    """Start ``work`` in a forked process and return its pid; it exits 0, or 1 on any exception."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def kill_before_call(number: int) -> None:
    """Have SIGKILL strike this process just before its ``number``-th file system call from now."""
    left = [number]

    def strike(event: str, *_: object) -> None:
        if event.removeprefix("os.") in CALLS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync

    def counted_sync(file: int) -> None:
        strike("open")
        sync(file)

    os.fsync = counted_sync  # type: ignore[assignment]
    sys.addaudithook(strike)


def killed_at_every_call(*, prepare: Action, work: Action, check: Action) -> int:
    """Run ``work`` with SIGKILL before its 0th, 1st, … call, checking each time; returns the kills."""
    for number in range(200):
        prepare()

        def doomed(number: int = number) -> None:
            kill_before_call(number)
            work()

        status = os.waitpid(in_child(doomed), 0)[1]
        check()
        if status == 0:
            return number
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("the work never ended")


def test_the_newest_state_is_loaded_and_the_only_one(root: Path) -> None:
    with ResumeStore("key") as store:
        assert store.load("state") is None
        for step in range(5):
            store.save("state", full(step))
        assert_is(store.load("state"), 4)
        assert sorted(os.listdir(store.folder)) == ["lock", "state.pt", "token"]
    with ResumeStore("key") as store:
        assert store.folder == root / ".dvc" / "tmp" / "dynat" / "key"
        assert_is(store.load("state"), 4)
    with ResumeStore("other") as store:
        assert store.load("state") is None


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped])
def test_a_damaged_state_starts_anew_and_says_so(
    damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with ResumeStore("key") as store:
        store.save("state", full(1))
        path = store.folder / "state.pt"
        damage(path)
    with ResumeStore("key") as store:
        assert store.load("state") is None
        warning = capsys.readouterr().err
        assert warning == f"{path}: damaged (its SHA-256 does not fit); computed again\n"
        store.save("state", full(2))
        assert_is(store.load("state"), 2)
    assert capsys.readouterr().err == ""


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_a_payload_in_resume_state_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ResumeStore("key") as store:
        store.save("state", {"step": 1, "evil": Payload()})
        assert store.load("state") is None
    assert not (tmp_path / "executed").exists()


def test_a_disk_that_fills_up_during_a_save_leaves_the_last_good_state_and_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResumeStore("key") as store:
        store.save("state", full(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(UserError, match=r"No space left.*last good state is in .*/key"):
                store.save("state", full(2))
        assert_is(store.load("state"), 1)
        assert sorted(os.listdir(store.folder)) == ["lock", "state.pt", "token"]


@forks
def test_a_kill_before_any_call_of_a_save_leaves_the_state_before_or_after_it() -> None:
    full(0)
    seen = set()

    def prepare() -> None:
        with ResumeStore("key") as store:
            if store.folder.exists():
                store.clear()
        with ResumeStore("key") as store:
            for step in (1, 2, 3):
                store.save("state", full(step))

    def work() -> None:
        with ResumeStore("key") as store:
            assert_is(store.load("state"), 3)
            store.save("state", full(4))

    def check() -> None:
        with ResumeStore("key") as store:
            state = store.load("state")
            assert state is not None
            assert_is(state, state["step"])
            seen.add(state["step"])
            store.save("state", full(5))
            assert_is(store.load("state"), 5)
            assert not [name for name in os.listdir(store.folder) if name.endswith(".tmp")]

    assert killed_at_every_call(prepare=prepare, work=work, check=check) > 10
    assert seen == {3, 4}


@forks
def test_a_kill_before_any_call_of_a_clear_leaves_the_newest_state_or_none() -> None:
    seen = set()

    def prepare() -> None:
        with ResumeStore("key") as store:
            for step in (1, 2, 3):
                store.save("state", full(step))

    def work() -> None:
        with ResumeStore("key") as store:
            store.clear()

    def check() -> None:
        with ResumeStore("key") as store:
            state = store.load("state")
            seen.add(state and state["step"])
            store.clear()

    assert killed_at_every_call(prepare=prepare, work=work, check=check) > 5
    assert seen == {3, None}


@forks
def test_kills_at_random_moments_of_saving_lose_at_most_the_save_in_progress(root: Path) -> None:
    saved = root / "saved"  # the last step whose save() returned

    def work() -> None:
        with ResumeStore("key") as store:
            step = (store.load("state") or {"step": 0})["step"]
            while True:
                step += 1
                store.save("state", full(step))
                saved.write_text(f"{step:09d}")

    last = 0
    for turn in range(20):
        pid = in_child(work)
        time.sleep(0.01 + 0.01 * (turn * 7 % 20))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with ResumeStore("key") as store:
            step = (store.load("state") or {"step": 0})["step"]
            if step:
                assert_is(store.load("state"), step)
        known = int(saved.read_text() or 0) if saved.exists() else 0
        assert step >= max(known, last)
        last = step
    assert last > 20


HOLD = """
import sys, time
from dynat.runtime.resume import ResumeStore
with ResumeStore("key"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_pid_of_the_first_until_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"already runs as process {first.pid};"), ResumeStore("key"):
            pass
        with ResumeStore("other"):
            pass
        first.kill()
        first.wait()
        with ResumeStore("key") as store:
            store.save("state", full(1))


def test_in_a_temporary_workspace_a_second_process_works_beside_the_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        (tmp_path / "workspace").mkdir()
        monkeypatch.chdir(tmp_path / "workspace")
        with ResumeStore("key") as store:
            assert store.folder == root.resolve() / ".dvc/tmp/dynat/key-2"
            store.save("state", full(1))
            assert_is(store.load("state"), 1)
        first.kill()
        first.wait()


def test_the_token_lasts_until_the_stage_is_done_and_the_starts_are_counted() -> None:
    with ResumeStore("key") as store:
        first = store.token
        assert store.resumed == 0
        store.save("state", full(1))
        store.save("square-0", full(1))
    with ResumeStore("key") as store:
        assert store.token == first
        assert store.resumed == 1
    with ResumeStore("key") as store:
        assert store.resumed == 2
        store.clear()
        assert not store.folder.exists()
    with ResumeStore("key") as store:
        assert store.token != first
        assert store.resumed == 0
        assert store.load("state") is None
        assert store.load("square-0") is None


def test_chunks_are_kept_by_name_and_a_damaged_one_is_done_again(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["apgd-ce-0", "apgd-ce-00", "../escape", "a/b"]
    with ResumeStore("key") as store:
        for step, name in enumerate(names):
            assert store.load(name) is None
            store.save(name, full(step))
    with ResumeStore("key") as store:
        for step, name in enumerate(names):
            assert_is(store.load(name), step)
        assert len(list(store.folder.glob("*.pt"))) == len(names)
        truncated(next(store.folder.glob("apgd-ce-00.*")))
        assert capsys.readouterr().err == ""
        assert store.load("apgd-ce-00") is None
        assert capsys.readouterr().err.count("damaged (") == 1
        assert_is(store.load("apgd-ce-0"), 0)


def test_a_damaged_token_is_said_and_replaced_and_the_chunks_stay(capsys: pytest.CaptureFixture[str]) -> None:
    for damage in (b"", b"\xff\xfe", b"name", b"name count"):
        with ResumeStore("key") as store:
            store.save("one", full(1))
        (store.folder / "token").write_bytes(damage)
        with ResumeStore("key") as store:
            assert len(store.token) == 32
            assert store.resumed == 0
            assert_is(store.load("one"), 1)
        assert capsys.readouterr().err.count("token: damaged") == 1
