"""What someone could change after a run, for the tests of the audit."""

import json
import shutil
import subprocess
from pathlib import Path

import yaml

CELL = "digits/pgd_at/0/pgd20"
ATTACK = "metrics/attack/digits/pgd_at/0"
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


def flip(path: Path) -> None:
    """Change the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def table(folder: Path) -> None:
    path = folder / "metrics/tables/digits.md"
    text = json.loads((folder / "metrics/tables/cells.json").read_text())["digits/pgd_at/mean/pgd20"]["text"]
    replace(path, text, ("9" if text[0] != "9" else "8") + text[1:])


def cells(folder: Path) -> None:
    path = folder / "metrics/tables/cells.json"
    found = json.loads(path.read_text())
    found[CELL]["text"] = "99.99 [99.9, 100.0]"
    path.write_text(json.dumps(found))


def metric(folder: Path) -> None:
    path = folder / f"{ATTACK}.json"
    found = json.loads(path.read_text())
    found["best"]["pgd20"]["accuracy"] += 1
    path.write_text(json.dumps(found, indent=1) + "\n")


def verdicts(folder: Path) -> None:
    path = folder / f"{ATTACK}.verdicts.json"
    found = json.loads(path.read_text())
    evidence = found["best"]["pgd20"]
    evidence["robust"] = f"{int(evidence['robust'], 16) ^ (1 << 10):0{len(evidence['robust'])}x}"
    path.write_text(json.dumps(found, indent=1) + "\n")


def weights(folder: Path) -> None:
    flip(folder / "models/digits/pgd_at/0/target.safetensors")


def data(folder: Path) -> None:
    flip(folder / "data/digits.safetensors")


def lock(folder: Path) -> None:
    path = folder / "dvc.lock"
    found = yaml.safe_load(path.read_text())
    entry = found["stages"]["prepare@digits"]["outs"][0]
    entry["md5"] = "0" * 32
    path.write_text(yaml.safe_dump(found, sort_keys=False))


def code(folder: Path) -> None:
    with open(folder / "dynat/step.py", "a") as file:
        file.write("# edited\n")


def parameter(folder: Path) -> None:
    replace(folder / "params.yaml", "lr: 0.05", "lr: 0.06")


def command(folder: Path) -> None:
    replace(
        folder / "dvc.lock",
        "python -m stages.attack digits pgd_at 0",
        "python -m stages.attack digits pgd_at 1",
    )


def other_seed(folder: Path) -> None:
    for suffix in (".json", ".verdicts.json"):
        shutil.copy(folder / f"metrics/attack/digits/pgd_at/1{suffix}", folder / f"{ATTACK}{suffix}")


def stage_never_run(folder: Path) -> None:
    path = folder / "dvc.lock"
    found = yaml.safe_load(path.read_text())
    del found["stages"]["attack_baseline@digits-pgd_at-0"]
    path.write_text(yaml.safe_dump(found, sort_keys=False))


def code_after_commit(folder: Path) -> None:
    """Ran with an edit that the commit does not have, and then undone."""
    found = yaml.safe_load((folder / "dvc.lock").read_text())
    for entry in found["stages"].values():
        for dep in entry["deps"]:
            if dep["path"] == "dynat/step.py":
                dep["md5"] = "1" * 32
    (folder / "dvc.lock").write_text(yaml.safe_dump(found, sort_keys=False))
    subprocess.run([*GIT, "commit", "-qam", "tampered"], cwd=folder, check=True)


def cut_metric(folder: Path) -> None:
    path = folder / f"{ATTACK}.json"
    path.write_text(path.read_text()[:-20])


def cut_lock(folder: Path) -> None:
    path = folder / "dvc.lock"
    path.write_text(path.read_text() + "  - : [\n")
