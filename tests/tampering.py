"""What someone could change after a run, for the tests of the audit."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from pipelines import commit
from safetensors.torch import load_file, save_file
from torch import Tensor

CELL = "digits/pgd_at/0/pgd20"
ATTACK = "metrics/attack/digits/pgd_at/0"
CLOSURE = "metrics/code/train.json"


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
    with open(folder / "dynat/methods/step.py", "a") as file:
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


def closure_recorded(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    """Edit the modules that the training's closure lists, with dvc.lock to match, and commit it."""
    content = json.loads((folder / CLOSURE).read_text())
    edit(content["modules"])
    text = json.dumps(content, indent=1) + "\n"
    (folder / CLOSURE).write_text(text)
    found = yaml.safe_load((folder / "dvc.lock").read_text())
    for entry in found["stages"].values():
        for each in (*entry["deps"], *entry["outs"]):
            if each["path"] == CLOSURE:
                each["md5"] = hashlib.md5(text.encode()).hexdigest()
    (folder / "dvc.lock").write_text(yaml.safe_dump(found, sort_keys=False))
    commit(folder, "tampered")


def code_after_commit(folder: Path) -> None:
    """Ran with an edit that the commit does not have, and then undone."""
    closure_recorded(folder, lambda modules: modules.update({"dynat.methods.step": "1" * 64}))


def module_left_out(folder: Path) -> None:
    closure_recorded(folder, lambda modules: modules.pop("dynat.methods.step"))


def closure_of_other_code(folder: Path) -> None:
    """The code has another meaning since, and check has run again."""

    def edit(entry: dict[str, Any]) -> None:
        (out,) = (each for each in entry["outs"] if each["path"] == CLOSURE)
        out["md5"] = "0" * 32

    locked(folder, "check", edit)


def entry(folder: Path, stage: str, kind: str, path: str) -> dict[str, Any]:
    """What dvc.lock says of a dependency or an output ("deps", "outs") of a stage."""
    found = yaml.safe_load((folder / "dvc.lock").read_text())["stages"][stage][kind]
    return next(dict(each) for each in found if each["path"] == path)


def locked(folder: Path, stage: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the entry of a stage in dvc.lock."""
    found = yaml.safe_load((folder / "dvc.lock").read_text())
    edit(found["stages"][stage])
    (folder / "dvc.lock").write_text(yaml.safe_dump(found, sort_keys=False))


def lock_without_dependency(folder: Path) -> None:
    def edit(entry: dict[str, Any]) -> None:
        entry["deps"] = [dep for dep in entry["deps"] if dep["path"] != CLOSURE]

    locked(folder, "train_baseline@digits-pgd_at-0", edit)


def lock_without_output(folder: Path) -> None:
    def edit(entry: dict[str, Any]) -> None:
        entry["outs"] = [out for out in entry["outs"] if not out["path"].endswith(".verdicts.json")]

    locked(folder, "attack_baseline@digits-pgd_at-0", edit)


def metric_removed(folder: Path) -> None:
    (folder / f"{ATTACK}.json").unlink()


def record_of_other_seed(folder: Path) -> None:
    runs = folder / "metrics/runs/train/digits/pgd_at"
    shutil.copy(runs / "1.json", runs / "0.json")


def mlflow(folder: Path, change: str) -> None:
    """Change the run of the attack in the MLflow store."""
    record = json.loads((folder / "metrics/runs/attack/digits/pgd_at/0.json").read_text())
    with closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        assert store.execute(f"UPDATE {change} AND run_uuid = ?", (record["mlflow_run_id"],)).rowcount == 1


def failed_mlflow_run(folder: Path) -> None:
    mlflow(folder, "runs SET status = 'FAILED' WHERE true")


def mlflow_run_of_other_weights(folder: Path) -> None:
    mlflow(folder, f"tags SET value = '{'0' * 64}' WHERE key = 'model.sha256'")


def witness(folder: Path, edit: Callable[[dict[str, Tensor], str, Tensor], None]) -> None:
    """Edit the tensors of the witness; the second argument is the key's prefix, the third natural images."""
    path = folder / f"{ATTACK}.witness.safetensors"
    tensors, prefix = load_file(path), "best/pgd20"
    natural = load_file(folder / "data/digits.safetensors")["test_images"][tensors[f"{prefix}/indices"]]
    assert len(natural) > 1, "the run has nothing to tamper with"
    edit(tensors, prefix, natural.float() / 255)
    save_file(tensors, path)


def witness_outside_the_ball(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor], prefix: str, natural: Tensor) -> None:
        first = tensors[f"{prefix}/images"][0]
        first.copy_(torch.where(first > 0.5, first - 0.3, first + 0.3))

    witness(folder, edit)


def witness_beyond_black(folder: Path) -> None:
    """In the ball, but darker than black."""

    def edit(tensors: dict[str, Tensor], prefix: str, natural: Tensor) -> None:
        pixels, black = tensors[f"{prefix}/images"][0], natural[0] == 0
        assert black.any()
        pixels[black] = -0.05

    witness(folder, edit)


def witness_without_attack(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor], prefix: str, natural: Tensor) -> None:
        tensors[f"{prefix}/images"] = natural

    witness(folder, edit)


def witness_dropped(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor], prefix: str, natural: Tensor) -> None:
        for name in ("indices", "images"):
            tensors[f"{prefix}/{name}"] = tensors[f"{prefix}/{name}"][1:].clone()

    witness(folder, edit)


def all_called_robust(folder: Path) -> None:
    """Every sample that is right when clean is called robust, and no witness speaks against it."""
    path = folder / f"{ATTACK}.verdicts.json"
    found = json.loads(path.read_text())
    found["best"]["pgd20"] = found["best"]["clean"]
    path.write_text(json.dumps(found, indent=1) + "\n")

    def edit(tensors: dict[str, Tensor], prefix: str, natural: Tensor) -> None:
        for name in ("indices", "images"):
            tensors[f"{prefix}/{name}"] = tensors[f"{prefix}/{name}"][:0].clone()

    witness(folder, edit)


def cut_metric(folder: Path) -> None:
    path = folder / f"{ATTACK}.json"
    path.write_text(path.read_text()[:-20])


def cut_lock(folder: Path) -> None:
    path = folder / "dvc.lock"
    path.write_text(path.read_text() + "  - : [\n")
