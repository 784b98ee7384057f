"""Signals that ask a program to leave; imports no torch, so that a fleet starts at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Whether a SIGTERM or SIGINT has come, which do no more; a later SIGINT is ``KeyboardInterrupt``."""
    signals: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if signals and signum == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(signals)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
