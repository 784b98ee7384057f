"""What a fleet says: a table that stays in place on a terminal, plain lines otherwise."""

import re
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

EPOCH = re.compile(r"^epoch (\d+)", re.MULTILINE)
CHUNK = re.compile(r"attack: (.+)$", re.MULTILINE)


@dataclass
class Running:
    """A stage under way."""

    where: str  # node and GPU
    started: float  # time.time()
    log: Path
    begins: int  # byte of the log at which the attempt begins
    expected: float  # seconds
    epochs: int | None  # of a training

    def progress(self, now: float) -> tuple[str, float | None]:
        """The epoch or the part that was finished last, and the seconds left, if known."""
        text, spent = self._said(), now - self.started
        if self.epochs and (found := EPOCH.findall(text)):
            first, last = int(found[0]), int(found[-1])
            each = spent / (last - first + 1)
            return f"epoch {last + 1} of {self.epochs}", each * (self.epochs - 1 - last)
        parts = CHUNK.findall(text)
        return (parts[-1] if parts else ""), max(0.0, self.expected - spent)

    def epoch(self) -> int:
        """The last epoch that this attempt finished, -1 before one."""
        return max(map(int, EPOCH.findall(self._said())), default=-1)

    def finished_a_chunk(self) -> bool:
        """Whether this attempt finished a part of an evaluation, which no other will do again."""
        return bool(CHUNK.search(self._said()))

    def _said(self) -> str:
        """What this attempt has printed so far."""
        try:
            with open(self.log, "rb") as file:
                file.seek(self.begins)
                return file.read().decode(errors="replace")
        except OSError:
            return ""


@dataclass
class Counts:
    """How many stages are where."""

    total: int
    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds_left: float = 0.0
    running: Mapping[str, Running] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} done", f"{len(self.running)} running"]
        parts += [f"{n} {what}" for n, what in ((self.failed, "failed"), (self.skipped, "skipped")) if n]
        left = f", about {duration(self.seconds_left)} left" if self.seconds_left else ""
        return ", ".join(parts) + left


class Display:
    """Lines that stay, and on a terminal the running stages below them."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Display":
        self._context: AbstractContextManager[Any] = self._live or nullcontext()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.update(Text(), refresh=True)
        self._context.__exit__(*error)

    def line(self, text: str) -> None:
        """Something happened."""
        if self._live:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def update(self, counts: Counts) -> None:
        """Show how things are; nothing where there is no terminal."""
        if self._live:
            self._live.update(Group(_table(counts, time.time()), Text(str(counts), "bold")), refresh=True)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min``, ``5 h 10 min``, ``2 d 3 h``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _table(counts: Counts, now: float) -> Table:
    table = Table("stage", "where", "for", "now", "left", box=None, pad_edge=False, header_style="dim")
    for name, each in counts.running.items():
        progress, left = each.progress(now)
        eta = duration(left) if left is not None else ""
        table.add_row(Text(name), each.where, duration(now - each.started), Text(progress), eta)
    return table
