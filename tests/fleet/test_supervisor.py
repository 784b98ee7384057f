"""A command ends when the one who asked for it does, and leaves how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dynat.fleet import supervisor

COMMAND = f"{sys.executable} -S -u work.py"
WORK = """import os, signal, sys, time
def stop(*_):
    open("stopped", "w").close(); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open("pid", "w").write(str(os.getpid()))
time.sleep(60)
"""


def begin(folder: Path, command: str, grace: float = 5.0) -> tuple["subprocess.Popen[bytes]", int]:
    """A supervisor in ``folder``, and the end of the pipe that keeps it going."""
    reading, writing = os.pipe()
    request: dict[str, Any] = {"command": command, "watch": reading, "grace": grace, "key": "k"}
    request |= {"outputs": ["out"], "result": str(folder / "result"), "statuses": str(folder / "statuses")}
    script = [sys.executable, "-S", supervisor.__file__, json.dumps(request)]
    process = subprocess.Popen(script, cwd=folder, pass_fds=[reading], process_group=0)
    os.close(reading)
    return process, writing


def pid(folder: Path) -> int:
    while not ((folder / "pid").exists() and (folder / "pid").read_text()):
        time.sleep(0.02)
    return int((folder / "pid").read_text())


def gone(process: int) -> bool:
    for _ in range(250):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_the_exit_status_and_the_hashes_of_the_outputs_are_kept(tmp_path: Path) -> None:
    process, writing = begin(tmp_path, "mkdir out && printf 1 > out/a")
    assert process.wait() == 0
    assert (tmp_path / "out/a").read_text() == "1"
    result = json.loads((tmp_path / "result").read_text())
    assert result == {"key": "k", "status": 0, "outputs": {"out": supervisor.sha256(tmp_path / "out")}}
    (tmp_path / "out/a").write_text("2")
    assert result["outputs"]["out"] != supervisor.sha256(tmp_path / "out")
    os.close(writing)


def test_a_closed_pipe_stops_the_command_gracefully(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "result").write_text("of an attempt that has ended")
    process, writing = begin(tmp_path, COMMAND)
    pid(tmp_path)
    os.close(writing)
    assert process.wait() == 75
    assert (tmp_path / "stopped").exists()
    assert (tmp_path / "result").read_text() == "of an attempt that has ended"


def test_a_command_that_does_not_listen_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK.replace("SIGTERM, stop", "SIGTERM, signal.SIG_IGN"))
    process, writing = begin(tmp_path, COMMAND, grace=0.3)
    pid(tmp_path)
    os.close(writing)
    assert process.wait() == 128 + signal.SIGKILL


def test_a_supervisor_that_is_killed_takes_its_command_with_it(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    process, writing = begin(tmp_path, COMMAND)
    working = pid(tmp_path)
    process.kill()
    process.wait()
    assert gone(working)
    assert (tmp_path / "stopped").exists()
    os.close(writing)


@pytest.mark.parametrize(("statuses", "expected"), [("75\n75\n", 75), ("75\n2\n", 2), ("0\n1\n", 1), ("", 1)])
def test_the_status_below_torchrun_is_that_of_the_stages(
    tmp_path: Path, statuses: str, expected: int
) -> None:
    (tmp_path / "work.py").write_text(f"open('statuses', 'a').write({statuses!r}); raise SystemExit(1)")
    process, writing = begin(tmp_path, COMMAND)
    assert process.wait() == expected
    os.close(writing)
