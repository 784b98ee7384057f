"""How far a stage is: a bar on a terminal, plain lines otherwise. No output's byte depends on it."""

import sys
from collections.abc import Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def watched(items: Iterator[Item], label: str, count: int) -> Iterator[Item]:
    """The ``count`` items, with a bar on a terminal while they are used."""
    yield from tqdm(items, label, count, leave=False, disable=not sys.stderr.isatty())


class Counter:
    """Parts of some work that are done: a bar on a terminal, else a line each on stdout."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.terminal = label, sys.stderr.isatty()
        self.bar = tqdm(desc=label, unit=unit, leave=False, disable=not self.terminal)

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def expect(self, count: int) -> None:
        """There will be ``count`` more parts."""
        self.bar.total = (self.bar.total or 0) + count

    def done(self, part: str) -> None:
        """One more part is finished."""
        self.bar.update()
        self.bar.set_postfix_str(part)
        if not self.terminal:
            print(f"{self.label}: {part}", flush=True)
