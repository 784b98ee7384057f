"""Accept an edit that changes no result: bring dvc.lock up to date by proof instead of by running.

The code that dvc.lock names and the present, committed code compute the same things side by side on the
recorded inputs. STAGE as in dvc.lock, such as train_dynat@digits-dynat-0, or its first part, such as
train_dynat; without one all stages that the code has made stale. Exit status: 0 accepted or nothing to do,
1 refused and nothing touched, 2 proved, but dvc.lock could not be brought up to date.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from dynat.accept.comparison import compare
from dynat.accept.stale import Stale, select
from dynat.audit.lineage import Lineage
from dynat.config.params import load
from dynat.errors import UserError
from dynat.runtime.closure import code_key
from dynat.runtime.files import read_json, write_json
from dynat.runtime.stage import begin


def main(arguments: list[str] | None = None) -> int:
    """Accept or refuse; returns the exit status."""
    parser = argparse.ArgumentParser("python -m dynat.accept", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stages", metavar="STAGE", nargs="*")
    wanted = parser.parse_args(arguments).stages
    root = Path()
    try:
        begin()
        load()
        head = _committed(root)
        stale = select(Lineage(root), wanted)
        if not stale:
            print("no stage is stale because of its code: nothing to accept")
            return 0
        print(f"comparing {len(stale)} stages with the code that they ran with", flush=True)
        compared = compare(root, stale)
    except UserError as error:
        print(f"refused, nothing touched: {error}", file=sys.stderr)
        return 1
    try:
        _accept(root, stale, compared, head)
    except UserError as error:
        again = "git checkout dvc.lock metrics/code, mend that and start again"
        print(f"proved, but not all is brought up to date: {error}; {again}", file=sys.stderr)
        return 2
    return 0


def _committed(root: Path) -> str:
    """The present commit; :class:`UserError` if code, parameters or lock differ from it."""
    paths = ("dynat", "stages", "params.yaml", "dvc.yaml", "dvc.lock")
    if listed := _run(root, "git", "status", "--porcelain", "--", *paths).split():
        raise UserError(f"{listed[1]}: not as committed; commit the edit first, or restore it")
    return _run(root, "git", "rev-parse", "HEAD").strip()


def _accept(root: Path, stale: Iterable[Stale], compared: dict[str, list[str]], head: str) -> None:
    """Bring the closures, dvc.lock and the records up to date."""
    dvc = (sys.executable, "-m", "dvc")
    _run(root, *dvc, "repro", "--quiet", "check")
    _run(root, *dvc, "commit", "--quiet", "--force", *compared)
    proof = {"commit": head, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    for stage in stale:
        name, what = f"metrics/runs/{stage.kind}/{stage.run}.json", compared[stage.name]
        if record := read_json(root, name):
            link = {"code": code_key(stage.kind), "from": stage.code, "compared": what, **proof}
            write_json(root / name, {**record, "accepted": [*record.get("accepted", []), link]})
        print(f"accepted {stage.name}: {what[0]}")
    print("commit dvc.lock, metrics/code and metrics/runs together")


def _run(root: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(f"{' '.join(command[:4])}: {reason[-1]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
