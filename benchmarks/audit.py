"""How long the audit of a large study takes, beside ``dvc status`` of the same repository.

``python -m benchmarks.audit [--seeds 3]``, after ``dvc repro``: in a copy of the repository the results of
seed 0 stand for several seeds, DVC itself writes their ``dvc.lock``, and the tables are made anew. Every link
is checked as in earnest, with all outputs at hand; the audit fails here if one is broken.

On 2 busy virtual cores, 2 seeds: 360 cells in 3.1 s after imports (6.5 s with them), one cell in 1.4 s;
``dvc status``, which checks hashes alone, 13.6 s.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from benchmarks.copies import ROOT, copy_sources, run

REPEATS = 3
GIT = ("git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org")
AUDIT = (sys.executable, "-m", "dynat.audit")
STATUS = (sys.executable, "-m", "dvc", "status", "-q")
WITHIN = """
import contextlib, io, sys, time
from dynat.audit.__main__ import main
with contextlib.redirect_stdout(io.StringIO()):
    main([sys.argv[1]])  # imports
    start = time.perf_counter()
    status = main([sys.argv[1]])
print(time.perf_counter() - start)
sys.exit(status)
"""


def study(folder: Path, seeds: int) -> None:
    """A committed repository in ``folder`` with the results of every method for each seed."""
    copy_sources(folder)
    for name in ("data", "models", "metrics"):  # outputs that Git does not have
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    for path in sorted(folder.glob("m*/**/*")):
        stem, _, suffix = path.name.partition(".")
        for seed in range(1, seeds) if stem == "0" else ():
            twin = path.with_name(f"{seed}.{suffix}".rstrip("."))
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, twin)
            if "runs" in path.parts:
                record = json.loads(path.read_text())
                record |= {"seed": seed, "stage": f"{record['stage'].rsplit('-', 1)[0]}-{seed}"}
                twin.write_text(json.dumps(record))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, "seeds": [*range(seeds)]}, sort_keys=False))
    run(folder, *GIT, "init", "-q")
    run(folder, sys.executable, "-m", "stages.tabulate")
    run(folder, sys.executable, "-m", "dvc", "commit", "-f", "-q")
    run(folder, *GIT, "add", "-A")
    run(folder, *GIT, "commit", "-qm", "study")


def best(measure: Callable[[], float]) -> float:
    """The fastest of a few repetitions, in seconds."""
    return min(measure() for _ in range(REPEATS))


def wall(folder: Path, *command: str) -> float:
    """Seconds that a command takes, imports included."""
    start = time.perf_counter()
    run(folder, *command)
    return time.perf_counter() - start


def after_imports(folder: Path, wanted: str) -> float:
    """Seconds that an audit takes in a process that has done one before."""
    return float(run(folder, sys.executable, "-c", WITHIN, wanted))


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study(folder, seeds)
        cells = json.loads((folder / "metrics/tables/cells.json").read_text())
        print(run(folder, *AUDIT, "--all"), end="")
        plain = best(partial(wall, folder, *STATUS))
        print(f"dvc status, hashes only        {plain:6.2f} s")
        for label, wanted in ((f"--all over {len(cells)} cells", "--all"), ("one cell", next(iter(cells)))):
            whole = best(partial(wall, folder, *AUDIT, wanted))
            within = best(partial(after_imports, folder, wanted))
            for what, seconds in ((label, whole), ("  after imports", within)):
                print(f"{what:30} {seconds:6.2f} s  {seconds / plain:5.2f} of dvc status")


if __name__ == "__main__":
    main()
