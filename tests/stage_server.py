"""Stages in processes that start at once: torch is imported here, each request is a fork of this process.

Reads a JSON request per line: ``{"stage", "arguments", "folder", "log", "largest_file"}``. Answers with the
pid, and, when that process has ended, with its exit code (negative: the signal). What runs in the fork is the
stage's own ``main``, with the arguments and in the folder of a process of its own.
"""

import importlib
import json
import os
import resource
import sys
from typing import Any

STAGES = ("prepare", "train", "attack", "autoattack")
LIBRARY = (
    *("data.splits", "methods.step", "methods.training"),
    *("evaluation.evaluate", "evaluation.autoattack", "evaluation.checkpoints"),
)


def become(request: dict[str, Any]) -> None:
    """Run the stage in this process and exit as it does."""
    from dynat.runtime.stage import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(to, fd)
    os.setsid()
    os.chdir(request["folder"])
    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    sys.argv = [f"stages.{request['stage']}", *request["arguments"]]
    main(sys.modules[f"stages.{request['stage']}"].stage)


def serve() -> None:
    """Answer until there are no more requests."""
    for name in [*(f"dynat.{each}" for each in LIBRARY), *(f"stages.{each}" for each in STAGES)]:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            become(json.loads(line))


if __name__ == "__main__":
    serve()
