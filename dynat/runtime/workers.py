"""Independent pieces of CPU work in forked processes that say what they finish.

One thread per process is what a small network can use, so several cores are used by several processes; the
pieces, and with them the results, are the same for any number of them.
"""

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from dynat.errors import UserError

ORPHAN_POLL_S = 0.1
DONE, FAULT = b"+", b"!"  # first byte of a worker's line: something is finished, something cannot be
Say = Callable[[str], None]
Work = Sequence[Callable[[Say], object]]


def share(work: Work, workers: int, heard: Say, stopped: Callable[[], bool]) -> bool:
    """Do all of ``work`` in ``workers`` forked processes; False if ``stopped`` asked to leave.

    Each piece of work gets a function that reports a line, ``heard`` gets the lines in the parent. A process
    that dies is a :class:`UserError`, its own :class:`UserError` if it had one, ``RuntimeError`` after any
    other exception. On a stop or a :class:`UserError` all are killed at once, so what they leave must be
    atomic. SIGINT and SIGTERM are for the parent; when it dies, so do they.
    """
    sys.stdout.flush()
    reader, writer = os.pipe()
    children = [_fork(work[rank::workers], reader, writer) for rank in range(workers)]
    os.close(writer)
    statuses: list[int] = []
    finished = False
    try:
        finished = _listen(reader, heard, stopped)
    finally:
        os.close(reader)
        for child in children:
            if not finished:
                os.kill(child, signal.SIGKILL)  # a zombie at worst: nobody has waited for it yet
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if finished and any(status > 0 for status in statuses):
        raise RuntimeError("a worker process failed; its message stands above")
    if finished and (killed := [status for status in statuses if status < 0]):
        raise UserError(
            f"a worker process was killed by signal {-killed[0]}; start again, with fewer workers if memory "
            "ran out: what is finished is kept"
        )
    return finished


def _listen(reader: int, heard: Say, stopped: Callable[[], bool]) -> bool:
    """Pass the lines of all processes on until the last has ended; False if ``stopped`` asked to leave."""
    rest = b""
    while not stopped():
        if not select.select([reader], [], [], 0.2)[0]:
            continue
        read = os.read(reader, 4096)
        if not read:
            return True
        *full, rest = (rest + read).split(b"\n")
        for line in full:
            if line.startswith(FAULT):
                raise UserError(line.removeprefix(FAULT).decode())
            heard(line.removeprefix(DONE).decode())
    return False


def _fork(work: Work, reader: int, writer: int) -> int:
    """Start a process that does ``work`` and return its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    status = 1
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C reaches the whole group
            signal.signal(signum, signal.SIG_IGN)
        threading.Thread(target=_end_with, args=[parent], daemon=True).start()
        os.close(reader)
        for piece in work:
            piece(lambda line: _tell(writer, DONE, line))
        status = 0
    except UserError as error:
        _tell(writer, FAULT, str(error))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _tell(writer: int, kind: bytes, line: str) -> None:
    os.write(writer, kind + line.encode() + b"\n")


def _end_with(parent: int) -> None:
    """End this process once ``parent`` is gone: it would go on for long, and hold its parent's locks."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL_S)
    os._exit(1)
