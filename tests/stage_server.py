"""Processes that start at once: each is a fork of one in which torch, MLflow and this project are imported.

``python stage_server.py SOCKET`` answers requests on a Unix socket until its standard input ends. A request
is a line of JSON, ``{"arguments", "folder", "environment"}``, with three open files for standard input,
output and error. The answer is the pid of the new process, which leads a session of its own, and when it has
ended its exit code (negative: the signal). What runs in the fork is what ``python -m MODULE ARGUMENTS...``
runs, in the folder and the environment of the request. Its code is that of the folder, or where that has none
of this checkout. A request may also have ``"code"``, a folder with other code, ``"largest_file"``, a size in
bytes, and ``"kill_at"``, the arguments of ``die_at``.

``stand_in`` puts a ``python`` into a folder for the front of PATH, which hands ``-m stages.<stage>`` to the
server and everything else to the interpreter: stages that DVC runs start at once, too.
"""

import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES: dict[str, bytes] = {}  # of what the server has imported
WARM = ("mlflow.tracking", "pyautoattack", "sklearn.datasets", "matplotlib.figure", "dynat", "stages")


# ------------------------------------------------------------------------------------------------- server


def import_everything() -> None:
    """Import what the stages import, pinned to the kernels that they pin; know the closures of this code."""
    from dynat.runtime import closure
    from dynat.runtime.machine import PINNED

    os.environ.update(PINNED)  # before torch
    found = json.loads(subprocess.check_output([sys.executable, "-P", closure.__file__, str(ROOT)]))
    closure.closures = lambda: found  # grimp has threads, which a fork would miss
    for name in WARM:
        module = importlib.import_module(name)
        if name in ("dynat", "stages"):
            for each in pkgutil.walk_packages(module.__path__, f"{name}."):
                if not each.name.endswith("__main__"):
                    importlib.import_module(each.name)


def serve(path: str) -> None:
    """Answer until standard input ends."""
    SOURCES.update(sources(ROOT))
    import_everything()
    gc.collect()
    gc.freeze()  # forks share what they do not touch
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as ready:
        listening.bind(path)
        listening.listen(64)
        ready.register(listening, selectors.EVENT_READ)
        ready.register(sys.stdin, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that answer
        print("ready", flush=True)
        while not any(key.fileobj is sys.stdin for key, _ in ready.select()):
            link, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                ready.close()
                answer(link)
            link.close()


def answer(link: socket.socket) -> None:
    """In a process of its own: run what is asked for, and say how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(link, 1, 3)
    request = json.loads(link.makefile().readline())
    pid = os.fork()
    if pid == 0:
        link.close()
        become(request, files)
    for file in files:
        os.close(file)
    with link.makefile("w") as said:
        print(pid, file=said, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=said, flush=True)
    os._exit(0)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Run the module in this process and exit as it does."""
    from dynat.runtime.machine import PINNED

    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    for name, number in (("stdout", 1), ("stderr", 2)):  # the server's own may have been of a file that seeks
        stream = open(number, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115  for the process
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.setsid()
    pins = {name: os.environ[name] for name in PINNED}
    os.environ.clear()
    os.environ.update(request["environment"] | pins)
    os.chdir(request["folder"])
    if request.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request.get("kill_at"):
        die_at(*request["kill_at"])
    _, module, *arguments = request["arguments"]
    sys.argv = [module, *arguments]
    use(Path(request.get("code") or request["folder"]))
    sys.modules.pop(module, None)  # it is run, not imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def use(code: Path) -> None:
    """Forget what was imported if ``code`` has another version of the project."""
    if (code / "dynat").is_dir() and sources(code) != SOURCES:
        for name in [name for name in sys.modules if name.split(".")[0] in ("dynat", "stages")]:
            del sys.modules[name]
        sys.path[0] = str(code)


def sources(folder: Path) -> dict[str, bytes]:
    """The files of the project in ``folder``."""
    paths = [path for name in ("dynat", "stages") for path in (folder / name).rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.parent.name != "__pycache__"}


def die_at(pattern: str, skip: int) -> None:
    """SIGKILL this process when it, or a worker of it, would put a file of that name in place for good."""
    pid, left = os.getpid(), skip

    def dying(original: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, *more: Any, **options: Any) -> None:
            nonlocal left
            if re.search(pattern, os.fspath(source)):
                left -= 1
                if left < 0:
                    os.kill(pid, signal.SIGKILL)
            original(source, *more, **options)

        return rename

    os.rename, os.replace = dying(os.rename), dying(os.replace)


# ------------------------------------------------------------------------------------------------- clients


@contextmanager
def process(path: str, request: dict[str, Any], files: list[int]) -> Iterator[tuple[int, Any]]:
    """A process of the server at ``path``: its pid, and a function that waits and returns its exit code."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        socket.send_fds(link, [b"x"], files)
        link.sendall(json.dumps(request).encode() + b"\n")
        with link.makefile() as said:
            yield int(said.readline()), lambda: int(said.readline())


def stand_in(folder: Path, path: str) -> None:
    """A ``python`` in ``folder`` that asks the server at ``path`` for stages."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" "{path}" "$@"\n')
    program.chmod(0o755)


def as_python(path: str, arguments: list[str]) -> None:
    """What that ``python`` does: a stage of the server in its place, to which it passes signals on."""
    if arguments[:1] != ["-m"] or not arguments[1].startswith("stages."):
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with process(path, request, [0, 1, 2]) as (pid, code):
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda number, _: os.kill(pid, number))
        ended = code()
    sys.exit(ended if ended >= 0 else 128 - ended)


if __name__ == "__main__":
    if sys.argv[2:]:
        as_python(sys.argv[1], sys.argv[2:])
    else:
        sys.path[0] = str(ROOT)
        serve(sys.argv[1])
