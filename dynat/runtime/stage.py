"""What every stage script shares: one-line faults, a validated run of the matrix."""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dynat.config.params import Params, Study, load, recipe_of
from dynat.errors import UserError

INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal, the next run goes on from there


@dataclass(frozen=True)
class Run:
    """One setting, method and seed of the matrix, and its parameters."""

    setting: str
    method: str
    seed: int
    params: Params

    @property
    def study(self) -> Study:
        """The setting's entry of params.yaml, as the method runs it."""
        return self.params.study_of(self.setting, self.method)

    def path(self, folder: str, suffix: str = "") -> Path:
        """``folder/<setting>/<method>/<seed><suffix>``, the layout of every output."""
        return Path(folder, self.setting, self.method, f"{self.seed}{suffix}")


def begin() -> None:
    """What every command does first: what the terminal cannot show is replaced, other code is not run.

    Raises :class:`UserError` where ``PYTHONSAFEPATH`` or ``-P`` made Python find another clone's.
    """
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):  # DVC's import may wrap them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    here, found = Path("dynat").resolve(), Path(__file__).parents[1]
    if sys.flags.safe_path and here.exists() and not here.samefile(found):
        raise UserError(
            f"this would run the code of {found}, not of {here}; unset PYTHONSAFEPATH, leave out -P"
        )


def main(stage: Callable[[], int | None]) -> None:
    """Run a stage; a fault that the user can mend is one line on stderr and exit status 2."""
    try:
        begin()
        status = stage() or 0
    except UserError as error:
        removed = re.match("prepare|import|train|attack|autoattack", os.environ.get("DVC_STAGE", ""))
        removed = removed if "dvc checkout" not in str(error) else None
        hint = "; dvc checkout brings back an earlier output" if removed else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, BrokenPipeError):  # that: nobody reads the output any more, as after head
        status = INTERRUPTED
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    if file := os.environ.get("DYNAT_STATUSES"):  # torchrun's own exit status is 1 for any other than 0
        with open(file, "a", encoding="utf-8") as statuses:
            statuses.write(f"{status}\n")
    os._exit(status)  # taking torch and MLflow down takes a second, and crashes beside a thread that hangs


@contextmanager
def memory_for(key: str) -> Iterator[None]:
    """Raise :class:`UserError`, naming ``key`` of params.yaml, where torch gets no more memory within."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|ALLOC_FAILED|DefaultCPUAllocator", str(error), re.IGNORECASE):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        text = asked[0].replace("T", "t", 1) if asked else "no more memory"
        raise UserError(f"{key}: out of memory, {text}; choose a smaller one, or another device") from None


def run_of_arguments(description: str) -> Run:
    """The run named on the command line, with the whole of params.yaml validated first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("setting")
    parser.add_argument("method")
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    params = load()
    if arguments.setting not in params.study:
        raise UserError(f"setting {arguments.setting!r} is not in params.yaml's study")
    method, known = arguments.method, (*params.recipes, *params.checkpoint)
    run = Run(arguments.setting, method, arguments.seed, params)
    if method in params.checkpoint:
        return run
    guide, _ = params.guide_run(method, 0) or ("", 0)
    for name, among in ((method, params.recipes), (guide, known)):
        if name and recipe_of(name) not in among:
            raise UserError(f"method {name!r} is not in params.yaml's recipes, nor in checkpoint")
    if params.recipe(arguments.setting, method).frozen_guide != bool(guide):
        named = "with a frozen guide, and only then, a method is named after both, as rslad-trades"
        raise UserError(f"method {method!r}: {named}")
    return run
