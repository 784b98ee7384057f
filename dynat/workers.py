"""Independent pieces of CPU work in forked processes that say what they finish.

One thread per process is what a small network can use, so several cores are used by several processes; the
pieces, and with them the results, are the same for any number of them.
"""

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

Say = Callable[[str], None]
Work = Sequence[Callable[[Say], object]]


def share(work: Work, workers: int, heard: Say, stopped: Callable[[], bool]) -> bool:
    """Do all of ``work`` in ``workers`` forked processes; False if ``stopped`` asked to leave.

    Each piece of work gets a function that reports a line, ``heard`` gets the lines in the parent. A process
    that fails raises ``RuntimeError`` here; on a stop the processes are killed at once, so what they leave
    must be atomic. Orphans end with their next report.
    """
    sys.stdout.flush()
    reader, writer = os.pipe()
    children = [_fork(work[rank::workers], reader, writer) for rank in range(workers)]
    os.close(writer)
    going = True
    with os.fdopen(reader, "rb", buffering=0) as lines:
        rest = b""
        while going:
            if stopped():
                going = False
                for child in children:
                    os.kill(child, signal.SIGKILL)
            elif select.select([lines], [], [], 0.2)[0]:
                read = lines.read(4096)
                if not read:
                    break
                *full, rest = (rest + read).split(b"\n")
                for line in full:
                    heard(line.decode())
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    if going and failed:
        raise RuntimeError("a worker process failed; its message stands above")
    return going


def _fork(work: Work, reader: int, writer: int) -> int:
    """Start a process that does ``work`` and return its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.close(reader)

        def say(line: str) -> None:
            if os.getppid() != parent:
                os._exit(1)
            os.write(writer, f"{line}\n".encode())

        for piece in work:
            piece(say)
        status = 0
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)
