"""How long ``dvc repro`` takes when nothing has changed: the default selection and everything selected.

``python -m benchmarks.no_op [--rounds 3]``. In a copy of the repository a small file stands for every missing
output of the selected stages, folders too, and DVC itself writes ``dvc.lock`` for them; a real run looks at
the few files in each folder besides. A loop of Python beside each run tells how busy the machine is.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml
from dvc.dvcfile import Lockfile
from dvc.repo import Repo

from benchmarks.copies import copy_sources, run

STATUS = (sys.executable, "-m", "dvc", "status", "-q")
NO_OP = (sys.executable, "-m", "dvc", "repro", "-q")


def select_everything(folder: Path) -> None:
    """Select all settings and all recipes in the copy's params.yaml: recipes with an alpha are variants."""
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    variants = [name for name, recipe in params["recipes"].items() if "alpha" in recipe]
    chosen = {
        "settings": list(params["study"]),
        "baselines": [name for name in params["recipes"] if name not in variants],
        "variants": variants,
    }
    for key, names in chosen.items():
        old = "\n- ".join(["", *params[key]])
        assert text.count(old) == 1, f"params.yaml: {key} is not a block list"
        text = text.replace(old, "\n- ".join(["", *names]))
    path.write_text(text, encoding="utf-8")


def pretend(folder: Path) -> int:
    """Stand-ins for all missing outputs, and a lock that they agree with; returns how many stages."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        with Repo(str(folder)) as repo, repo.lock:
            stages = list(repo.index.stages)
            for out in (out for stage in stages for out in stage.outs):
                path = Path(out.fs_path)
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(f"{path.relative_to(folder)}\n", encoding="utf-8")
            for stage in stages:
                stage.save()
                stage.commit()
            Lockfile(repo, str(folder / "dvc.lock")).dump_stages(stages)
    finally:
        os.chdir(here)
    return len(stages)


def loop() -> float:
    """Seconds of five million additions."""
    start, total = time.perf_counter(), 0
    for number in range(5_000_000):
        total += number
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for label in ("default selection", "all settings and methods"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            copy_sources(folder)
            run(folder, "git", "init", "-q")
            if label != "default selection":
                select_everything(folder)
            count = pretend(folder)
            run(folder, *STATUS)  # fails if anything has changed
            seconds, busy = [], []
            for _ in range(rounds):
                busy.append(loop())
                start = time.perf_counter()
                run(folder, *NO_OP)
                seconds.append(time.perf_counter() - start)
        print(
            f"{label}: {count} stages, {statistics.median(seconds):.1f} s ({min(seconds):.1f} to "
            f"{max(seconds):.1f} in {rounds} rounds; the loop {statistics.median(busy):.2f} s)"
        )


if __name__ == "__main__":
    main()
