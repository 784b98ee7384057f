"""Work shared by forked processes."""

import time
from functools import partial
from pathlib import Path

import pytest

from dynat.workers import Say, share


def write(path: Path, say: Say) -> None:
    path.write_text("done")
    say(path.name)


def test_all_work_is_done_and_heard_of(tmp_path: Path) -> None:
    heard: list[str] = []
    names = [f"piece{i}" for i in range(7)]
    assert share([partial(write, tmp_path / name) for name in names], 3, heard.append, lambda: False)
    assert sorted(heard) == names == sorted(path.name for path in tmp_path.iterdir())


def test_a_stop_ends_the_processes_at_once() -> None:
    begun = time.monotonic()
    assert not share([lambda say: time.sleep(60)] * 2, 2, lambda _: None, lambda: True)
    assert time.monotonic() - begun < 30


def test_a_failing_process_is_not_passed_over() -> None:
    def fail(say: Say) -> None:
        raise ValueError("boom")

    with pytest.raises(RuntimeError, match="worker"):
        share([fail], 1, lambda _: None, lambda: False)
