"""The same work with two trees of code: the recorded one, from Git, and the present one."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dynat.accept.changes import unproved
from dynat.accept.replica import IMAGES
from dynat.accept.stale import Stale
from dynat.audit.history import checkout, commit_with
from dynat.config import yaml_files
from dynat.errors import UserError
from dynat.runtime.closure import closure_file, closures
from dynat.runtime.files import read_csv, read_json

REPLICA = Path(__file__).with_name("replica.py")
PRESENT = Path(__file__).resolve().parents[2]
SAMPLES, BATCH = 8, 4  # test images of an evaluation, and a chunk of them
FEW: dict[str, dict[str, Any]] = {"attack": {"n": SAMPLES, "batch": BATCH}}
FEW["autoattack"] = {"n": [SAMPLES], "batch": BATCH, "workers": 1}
WHOLE = ("prepare", "import", "tabulate")  # stages that are compared by every file they write
WHAT = {"train": "every parameter, statistic and loss", **dict.fromkeys(WHOLE, "every file")}
ATTACKED = f"every attack on the first {SAMPLES} test images, in chunks of {BATCH}"
WHAT |= dict.fromkeys(FEW, f"{ATTACKED}; logits of the first {IMAGES}")


def compare(root: Path, stale: list[Stale]) -> dict[str, list[str]]:
    """Do the work of all stages twice, and return what was found equal for each, in words.

    Raises :class:`UserError`, which names what differs first, or what nothing executed.
    """
    groups: dict[tuple[str, str | None, str], list[Stale]] = defaultdict(list)
    for stage in stale:
        groups[stage.kind, stage.setting, stage.code].append(stage)
    found: dict[str, list[str]] = {}
    executed: dict[str, set[int]] = defaultdict(set)
    sources = []
    with tempfile.TemporaryDirectory(prefix="dynat-accept-") as folder:
        for number, stages in enumerate(groups.values()):
            space = Path(folder).resolve() / str(number)
            recorded = _recorded(root, stages[0], space / "recorded")
            modules = list(closures()[stages[0].kind]["modules"])
            spaces = [_workspace(root, space / which, stages[0]) for which in ("then", "now")]
            with ThreadPoolExecutor() as pool:
                work = ([recorded, PRESENT], spaces, [stages] * 2, [modules] * 2)
                before, after = pool.map(_replica, *work)
            for stage in stages:
                values = after["values"][stage.name]
                _same(root, stage, before["values"][stage.name], values)
                epochs = [name.partition(":")[0] for name, _ in values if name.startswith("epoch")]
                what = f"{len(values)} values equal to the bit: {WHAT[stage.kind]}"
                found[stage.name] = [what, *dict.fromkeys(epochs)]
            if stages[0].kind not in WHOLE:
                sources.append((_sources(recorded, modules), _sources(PRESENT, modules)))
            for module, lines in after["executed"].items():
                executed[module].update(lines)
    if idle := sorted({name for then, now in sources for name in unproved(then, now, executed)}):
        more = f", nor {len(idle) - 1} more" if len(idle) > 1 else ""
        raise UserError(f"{idle[0]}: changed, but nothing executed it{more}; run dvc repro")
    return found


def _recorded(root: Path, stage: Stale, folder: Path) -> Path:
    """``folder`` with the code that ``stage`` ran with."""
    commit = commit_with(root, closure_file(stage.kind).as_posix(), stage.code)
    if commit is None or not checkout(root, commit, folder):
        raise UserError(f"{stage.name}: no commit has the code that dvc.lock names; run dvc repro")
    return folder


def _same(root: Path, stage: Stale, before: list[list[str]], after: list[list[str]]) -> None:
    """Compare what both trees found, and the losses with ``trace.csv`` where this is its kind of machine."""
    for old, new in zip(before, after, strict=False):
        if old != new:
            raise UserError(f"{stage.name}: {new[0]} differs from the recorded code's; run dvc repro")
    if len(before) != len(after):
        counts = f"{len(after)} values, {len(before)} in the recorded code"
        raise UserError(f"{stage.name}: {counts}; run dvc repro")
    if stage.kind != "train":
        return
    found = dict(after)
    hardware = (read_json(root, f"metrics/runs/train/{stage.run}.json") or {}).get("hardware", {})
    if any(found[name] != _hash(hardware.get(name)) for name in ("cpu", "accelerator", "threads", "torch")):
        return
    for step, row in enumerate(read_csv(root, f"models/{stage.run}/trace.csv")):
        for name, value in row.items():
            place = f"epoch 0, step {step}: {name}"
            if place in found and found[place] != _hash(float(value)):
                raise UserError(f"{stage.name}: {place} is not what trace.csv has; run dvc repro")


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _workspace(root: Path, folder: Path, stage: Stale) -> Path:
    """A folder with params.yaml, and links to what the stage reads; evaluations are of a few images."""
    values = yaml_files.parse((root / "params.yaml").read_text(encoding="utf-8"))
    if stage.kind in FEW:
        section = values["study"][stage.setting][stage.kind]
        section |= FEW[stage.kind] | ({"runs": []} if "runs" in section else {})
    links = [root / "dvc.lock", *(root / "data").iterdir()]
    links += [root / "models"] if stage.kind != "import" else []  # which writes there
    if stage.kind == "import" and (module := values["checkpoint"][stage.method].get("module")):
        links.append(root / module.partition(":")[0])
    if stage.kind == "tabulate":
        links += [root / "metrics" / name for name in ("attack", "autoattack", "sanity")]
    for path in links:
        if path.exists() and path.relative_to(root).as_posix() not in stage.outs:
            link = folder / path.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    (folder / "params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return folder


def _replica(tree: Path, space: Path, stages: list[Stale], modules: list[str]) -> dict[str, Any]:
    """What ``stages`` compute with the code of ``tree`` in the workspace ``space``."""
    request = {"modules": modules, "stages": [stage._asdict() for stage in stages]}
    done = subprocess.run(
        [sys.executable, "-P", str(REPLICA), "answer.json"],
        input=json.dumps(request),
        cwd=space,
        env={**os.environ, "PYTHONPATH": str(tree), "DVC_ROOT": str(space)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        which = "present" if tree == PRESENT else "recorded"
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{stages[0].name}: the {which} code ends with {reason!r}; run dvc repro")
    return read_json(space, "answer.json") or {}


def _sources(tree: Path, modules: list[str]) -> dict[str, str]:
    """Module -> source, of those that the tree has."""
    found = {}
    for name in modules:
        path = tree.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                found[name] = file.read_text(encoding="utf-8")
    return found
