"""A small repository in which real ``dvc`` commands run, and one that has been run, for tests to copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[1]
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")
ABSENT = ("metrics/", "tests/", "benchmarks/", "dvc.lock")  # what a copy does not have of the working tree

SMALL = {  # a quarter of a minute instead of minutes; the same code and stages
    "settings": ["digits"],
    "baselines": ["pgd_at"],
    "variants": ["dynat"],
    "study.digits.train.epochs": 1,
    "study.digits.train.steps": 2,
    "study.digits.data.test": 20,
    "study.digits.attack.pgd": [10, 20],
    "study.digits.attack.apgd_steps": 5,
    "study.digits.autoattack.n": [2],
    "study.digits.autoattack.batch": 2,
    "study.digits.autoattack.epsilon": 0.3,  # no sample withstands it for thousands of queries
    "study.digits.autoattack.workers": 1,
}
FINISHED = {  # of the pipeline that has been run: some samples robust, some broken
    "seeds": [0, 1],
    "study.digits.data.train": 800,
    "study.digits.train.batch": 16,
    "study.digits.train.epochs": 2,
    "study.digits.data.test": 60,
}


def copy(folder: Path) -> Path:
    """A Git repository of the working tree, ``SMALL`` chosen, without outputs, cache or MLflow store."""
    folder.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if not name.startswith(ABSENT) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    choose(folder, SMALL)
    git(folder, "init", "-q", "--template=")
    commit(folder, "copy")
    return folder


def choose(folder: Path, values: dict[str, object]) -> None:
    """Change keys of the repository's params.yaml: ``{"study.digits.train.epochs": 1}``."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for path, value in values.items():
        *parents, last = path.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def git(folder: Path, *arguments: str) -> str:
    """Run ``git`` in ``folder``, with a name for commits; returns what it prints."""
    command = [*GIT, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, message: str) -> str:
    """Commit everything that is not ignored; returns the hash."""
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)
    return git(folder, "rev-parse", "HEAD")


def finished(shared: Path) -> Path:
    """The folder in ``shared`` of a pipeline that has been run and committed, which the first caller runs.

    Trains pgd_at and dynat with the seeds 0 and 1. Every process of the tests shares it: read it, or
    ``duplicate`` it, and change the duplicate only.
    """
    folder = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not folder.exists():
            partial = copy(shared / "unfinished")
            choose(partial, FINISHED)
            result = dvc(partial, "repro")
            assert result.returncode == 0, result.stdout + result.stderr
            commit(partial, "run")
            git(partial, "gc", "-q")  # one file to copy instead of hundreds
            partial.rename(folder)
    return folder


def duplicate(repository: Path, folder: Path) -> Path:
    """All of a repository in another folder: history, outputs, DVC's cache, the MLflow store."""
    return Path(shutil.copytree(repository, folder, symlinks=True))


def dvc(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter's dvc in ``folder``."""
    command = [sys.executable, "-m", "dvc", *arguments]
    env = dvc_environment() | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def dvc_environment() -> dict[str, str]:
    """The environment without what speaks of this repository, and with this interpreter as ``python``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    return kept | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def stages_run(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Names of the stages whose command was run."""
    lines = result.stdout.splitlines()
    return {line.split("'")[1] for line in lines if line.startswith("Running stage")}
