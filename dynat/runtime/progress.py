"""How far a stage is: a bar on a terminal, plain lines otherwise. No output's byte depends on this module."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def watched(items: Iterator[Item], label: str, count: int) -> Iterator[Item]:
    """The ``count`` items, with a bar on a terminal while they are used."""
    yield from tqdm(items, label, count, leave=False, disable=not sys.stderr.isatty())


@contextmanager
def counted(label: str, unit: str) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """What to call with the name of each part that is finished, and with how many more there will be.

    A bar on a terminal, else a line on stdout for each part.
    """
    terminal = sys.stderr.isatty()
    with tqdm(desc=label, unit=unit, leave=False, disable=not terminal) as bar:

        def notify(part: str) -> None:
            bar.update()
            bar.set_postfix_str(part)
            if not terminal:
                print(f"{label}: {part}", flush=True)

        def expect(count: int) -> None:
            bar.total = (bar.total or 0) + count

        yield notify, expect
