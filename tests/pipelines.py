"""A small repository in which real ``dvc`` commands run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

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
}


def copy(folder: Path) -> Path:
    """A clean Git clone of the working tree, without outputs, cache or MLflow store."""
    folder.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if not name.startswith("metrics/") and name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for path, value in SMALL.items():
        *parents, last = path.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def dvc(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter's dvc in ``folder``."""
    scripts = str(Path(sys.executable).parent)
    path = scripts + os.pathsep + os.environ["PATH"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**kept, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def stages_run(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Names of the stages whose command was run."""
    lines = result.stdout.splitlines()
    return {line.split("'")[1] for line in lines if line.startswith("Running stage")}
