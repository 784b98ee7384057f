"""What every stage script shares: one-line faults, a validated cell of the matrix, the record of a run."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynat.config.params import Params, Study, load
from dynat.errors import UserError
from dynat.runtime.files import write_json

INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal, the next run goes on from there


@dataclass(frozen=True)
class Run:
    """One cell of the matrix and its parameters."""

    setting: str
    method: str
    seed: int
    params: Params

    @property
    def study(self) -> Study:
        """The setting's entry of params.yaml."""
        return self.params.study[self.setting]

    def path(self, folder: str, suffix: str = "") -> Path:
        """``folder/<setting>/<method>/<seed><suffix>``, the layout of every output."""
        return Path(folder, self.setting, self.method, f"{self.seed}{suffix}")


def main(stage: Callable[[], int | None]) -> None:
    """Run a stage; a fault that the user can mend is one line on stderr and exit status 2."""
    try:
        sys.exit(stage() or 0)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def run_of_arguments(description: str) -> Run:
    """The cell named on the command line, with the whole of params.yaml validated first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("setting")
    parser.add_argument("method")
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    params = load()
    if arguments.setting not in params.study:
        raise UserError(f"setting {arguments.setting!r} is not in params.yaml's study")
    if arguments.method not in params.recipes:
        raise UserError(f"method {arguments.method!r} is not in params.yaml's recipes")
    return Run(arguments.setting, arguments.method, arguments.seed, params)


class RunRecord:
    """The volatile half of a result (time, hardware, versions, MLflow run), for ``metrics/runs``."""

    def __init__(self, stage: str, run: Run) -> None:
        self.kind, self.run = stage, run
        self.path = Path("metrics/runs", stage) / run.path("").with_suffix(".json")
        self.started, self.clock = datetime.now(UTC), time.monotonic()
        self.values: dict[str, Any] = {
            "stage": os.environ.get("DVC_STAGE", stage),
            "experiment": os.environ.get("DVC_EXP_NAME"),
            "baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
            "seed": run.seed,
        }

    def write(self, **more: Any) -> None:
        """Add what is known at the end and write the file."""
        seconds = round(time.monotonic() - self.clock, 2)
        started = self.started.isoformat(timespec="seconds")
        write_json(self.path, {**self.values, "started": started, "seconds": seconds, **more})
