"""What a stage needs and how long it may take, from params.yaml and from the records of earlier runs."""

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynat.config.params import Params
from dynat.errors import UserError

STAGE = re.compile(r"-m stages\.(\w+)((?: \S+)*)$")
GUESSED_S = {"train": 600.0, "autoattack": 600.0, "attack": 60.0}  # until a run of the kind has been seen
OTHERS_S = 5.0


@dataclass(frozen=True)
class Needs:
    """Devices and cores of one node that a stage has for itself while it runs."""

    gpus: float
    cpus: float
    workers: int = 0  # processes among which the cores are divided, which may be fewer; 0: as it is


@dataclass(frozen=True)
class Command:
    """A stage's command as the project writes it: ``python -m stages.<kind> <setting> <method> <seed>``."""

    kind: str  # "" for a command of the user's own
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, command: str) -> "Command":
        """The parts of ``command``."""
        found = STAGE.search(command)
        return cls(found[1], tuple(found[2].split())) if found else cls("", ())

    @property
    def record(self) -> Path | None:
        """Where a run of it writes its record."""
        whole = len(self.arguments) == 3
        return Path("metrics/runs", self.kind, *self.arguments).with_suffix(".json") if whole else None


def processes(launch: str) -> int:
    """Processes that the launcher starts, each with a GPU of its own.

    Raises :class:`UserError` for what a fleet cannot place.
    """
    words = shlex.split(launch)
    options = [word.lstrip("-").replace("_", "-") for word in words]
    for place, option in enumerate(options):
        name, equals, value = option.partition("=")
        value = value if equals else "".join(options[place + 1 : place + 2])
        if name == "nnodes" and value != "1":
            raise UserError(
                "params.yaml: launch: --nnodes: a fleet runs one training per GPU, which uses "
                "several machines best; leave it out"
            )
        if name == "nproc-per-node":
            if not value.isdigit() or int(value) < 1:
                raise UserError(
                    f"params.yaml: launch: nproc-per-node={value}: a fleet must know how many GPUs a stage "
                    "needs; write a number"
                )
            return int(value)
    return 1


def needs(command: Command, params: Params, meta: Mapping[str, Any], gpus_here: bool) -> Needs:
    """What a stage needs: a GPU per process if its study computes on one, else a core per thread.

    ``meta`` of the stage in dvc.yaml (``gpus``, ``cpus``) says otherwise; ``gpus_here``: whether any node has
    a GPU. A study without a number of threads has a node for itself: infinitely many cores.
    """
    gpus, cpus, workers = 0.0, 1.0, 0
    setting = command.arguments[0] if command.arguments else ""
    if command.kind == "check":  # tells whether what is selected can compute where it is to compute
        gpus = float(any(params.study[each].machine.device == "cuda" for each in params.settings))
    elif command.kind in GUESSED_S and setting in params.study:
        study, launched = params.study[setting], processes(params.launch)
        on_gpu = study.machine.device == "cuda" or (study.machine.device == "auto" and gpus_here)
        workers = study.autoattack.workers if command.kind == "autoattack" and not on_gpu else 0
        gpus = float(launched * on_gpu)
        cpus = launched * max(1, workers) * float(study.machine.threads or (1 if on_gpu else math.inf))
    return Needs(
        float(meta.get("gpus", gpus)), float(meta.get("cpus", cpus)), 0 if "cpus" in meta else workers
    )


class Durations:
    """Seconds that a stage is expected to take: of its last run, else of others of its kind and setting."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self._of: dict[Command, float] = {}
        for command in commands:
            try:
                self._of[command] = json.loads(command.record.read_text())["seconds"] if command.record else 0
            except (OSError, ValueError, KeyError):
                continue
        self._of = {command: seconds for command, seconds in self._of.items() if seconds}

    def finished(self, command: Command, seconds: float) -> None:
        """A run took so long."""
        self._of[command] = seconds

    def expected(self, command: Command) -> float:
        """In seconds."""
        if command in self._of:
            return self._of[command]
        for similar in (
            [
                s
                for c, s in self._of.items()
                if (c.kind, c.arguments[:1]) == (command.kind, command.arguments[:1])
            ],
            [s for c, s in self._of.items() if c.kind == command.kind],
        ):
            if similar:
                return sum(similar) / len(similar)
        return GUESSED_S.get(command.kind, OTHERS_S)
