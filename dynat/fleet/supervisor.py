"""Run one command so that nothing of it outlives who asked for it, and keep how it ended.

A script, ``python -S supervisor.py REQUEST``, without any import from the project: it starts in a few
milliseconds. The command runs in a process group of its own. When the pipe ``watch`` of the request closes,
because its other end asked for it or was killed, the group gets SIGTERM and after ``grace`` seconds SIGKILL;
when this process is killed, the kernel sends the command SIGTERM. ``result`` then holds the exit status and
the SHA-256 of the outputs, so that whoever comes later knows that the work is done.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
SHELL = set("&|;<>()$`\n")  # with one of these a command is more than one program
MISTAKE, INTERRUPTED = 2, 75  # exit statuses of the stages


def main(request: dict[str, Any]) -> int:
    """Run ``command`` in the folder ``root``; returns its exit status, 128 + n after signal n.

    Under torchrun, which ends with 1 whatever happened, it is the status that the stages wrote to
    ``statuses``.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked in what Ray starts
    libc = ctypes.CDLL(None)
    own = os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != own:  # it died before the request took effect
            os._exit(INTERRUPTED)

    statuses = Path(request["statuses"])
    statuses.unlink(missing_ok=True)
    text = request["command"]
    script = text if SHELL & set(text) else f"exec {text}"  # in the shell's place: the signal must reach it
    command = subprocess.Popen(["/bin/sh", "-c", script], process_group=0, preexec_fn=die_with_parent)
    threading.Thread(target=_watch, args=(command, request["watch"], request["grace"]), daemon=True).start()
    code = command.wait()
    status = code if code >= 0 else 128 - code
    if status and statuses.exists():
        written = {int(line) for line in statuses.read_text().split()} - {0}
        status = MISTAKE if MISTAKE in written else INTERRUPTED if written == {INTERRUPTED} else status
    if status == 0:  # alone: an attempt that only found another at work must not hide that one's end
        outputs = {name: sha256(Path(name)) for name in request["outputs"]}
        write(Path(request["result"]), {"key": request["key"], "status": status, "outputs": outputs})
    return status


def sha256(path: Path) -> str | None:
    """Of a file's bytes, or of the names and bytes of all files below a folder; None where nothing is."""
    if not path.exists():
        return None
    total = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as content:
            own = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(path)}\0{own}\n".encode())
    return total.hexdigest()


def write(path: Path, value: dict[str, Any]) -> None:
    """``value`` as JSON, at once; a result that cannot be written costs a repetition, no failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr)


def _watch(command: "subprocess.Popen[bytes]", pipe: int, grace: float) -> None:
    os.read(pipe, 1)  # returns when the last writer has closed it
    for signum, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 0)):
        try:
            os.killpg(command.pid, signum)
        except ProcessLookupError:
            return
        time.sleep(patience)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
