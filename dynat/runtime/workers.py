"""Independent work on several cores of a CPU: forked processes that say what they finish.

One thread per process is what a small network can use, so several cores are used by several processes; the
parts of the work, and with them the results, are the same for any number of them.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from multiprocessing import connection as connections
from typing import Any

from dynat.errors import UserError

POLL_S = 0.1
Say = Callable[[str], None]
Work = Sequence[Callable[[Say], object]]


def allowed(workers: int) -> int:
    """``workers``, or what a fleet leaves of them to this stage (``DYNAT_WORKERS``)."""
    return min(workers, int(os.environ.get("DYNAT_WORKERS", workers)))


def share(work: Work, workers: int, notify: Say, stopped: Callable[[], bool]) -> bool:
    """Do all of ``work`` in ``workers`` forked processes; False if ``stopped`` asked to leave.

    Each item gets a function that reports a line, ``notify`` gets the lines in the parent. What an item
    raises is raised here; a process that dies is a :class:`UserError`. On a stop or an exception all are
    killed at once, so what they leave must be atomic. SIGINT and SIGTERM are for the parent; when it dies,
    so do they.
    """
    context = get_context("fork")  # inherits torch and the networks; threads come later, if at all
    lines = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _become_worker, (work, lines)) as pool:
        try:
            pending = {pool.submit(_do, index) for index in range(len(work))}
            while pending:
                if stopped():
                    return False
                done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
                while not lines.empty():
                    notify(lines.get())
                for future in done:
                    future.result()
            return True
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed; start again, with fewer workers if memory ran out: what is "
                "finished is kept"
            ) from error
        finally:
            for child in active_children():
                child.kill()


_inherited: tuple[Work, Any] = ((), None)


def _become_worker(work: Work, lines: Any) -> None:
    global _inherited
    _inherited = work, lines
    for signum in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C reaches the whole group
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _do(index: int) -> None:
    work, lines = _inherited
    work[index](lines.put)


def _end_with_parent() -> None:
    """End this process once its parent is gone: it would go on for long, and hold its parent's locks."""
    parent = parent_process()
    assert parent is not None
    connections.wait([parent.sentinel])
    os._exit(1)
