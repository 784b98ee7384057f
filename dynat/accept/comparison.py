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
from typing import Any, NamedTuple

from dvc_objects.fs import localfs

from dynat.accept.changes import unproved
from dynat.accept.stale import Stale
from dynat.audit.history import checkout, commit_with
from dynat.audit.lineage import hash_of
from dynat.config import yaml_files
from dynat.errors import UserError
from dynat.runtime.closure import closure_file, closures
from dynat.runtime.files import read_csv, read_json

REPLICA = Path(__file__).with_name("replica.py")
PRESENT = Path(__file__).resolve().parents[2]
SAMPLES, BATCH = 8, 4  # test images of an evaluation, and a chunk of them
Answer = dict[str, Any]  # as replica.py writes it


class Compared(NamedTuple):
    """What was found equal for a stage."""

    what: list[str]
    commit: str  # whose code ran beside the present one; empty where the whole stage was done again


def compare(root: Path, stale: list[Stale]) -> dict[str, Compared]:
    """Do the work of all stages; :class:`UserError` names what differs first, or what nothing executed."""
    groups: dict[tuple[str, str, str], list[Stale]] = defaultdict(list)
    for stage in stale:
        groups[stage.kind, stage.setting or "", stage.code].append(stage)
    found: dict[str, Compared] = {}
    executed: dict[str, set[int]] = defaultdict(set)
    sources: list[tuple[dict[str, str], dict[str, str]]] = []
    with tempfile.TemporaryDirectory(prefix="dynat-accept-") as folder:
        for number, stages in enumerate(groups.values()):
            space = Path(folder).resolve() / str(number)
            if stages[0].kind in ("prepare", "tabulate"):  # seconds to minutes
                found |= _again(root, stages, space)
                continue
            both, ran = _side_by_side(root, stages, space, found)
            sources.append(both)
            for module, lines in ran.items():
                executed[module].update(lines)
    if idle := sorted({name for before, after in sources for name in unproved(before, after, executed)}):
        more = f", nor {len(idle) - 1} more" if len(idle) > 1 else ""
        raise UserError(f"{idle[0]}: changed, but nothing executed it{more}; run dvc repro")
    return found


def _again(root: Path, stages: list[Stale], folder: Path) -> dict[str, Compared]:
    """Stages done again with the present code: their outputs must be those of dvc.lock."""
    found = {}
    for stage in stages:
        space = _workspace(root, folder / stage.name, stage)
        _replica(PRESENT, space, [stage], [])
        for out, md5 in stage.outs.items():
            if hash_of(localfs, str(space / out)) != md5:
                raise UserError(f"{stage.name}: {out} comes out otherwise; run dvc repro")
        found[stage.name] = Compared(["done again, every output equal to the byte"], "")
    return found


def _side_by_side(
    root: Path, stages: list[Stale], folder: Path, found: dict[str, Compared]
) -> tuple[tuple[dict[str, str], dict[str, str]], dict[str, list[int]]]:
    """Trainings or evaluations of one setting in part, with both trees at once.

    Adds to ``found``; returns the sources of both trees, and the lines of the present one that ran.
    """
    kind, file = stages[0].kind, closure_file(stages[0].kind).as_posix()
    commit, recorded = commit_with(root, file, stages[0].code), folder / "recorded"
    if commit is None or not checkout(root, commit, recorded):
        raise UserError(f"{stages[0].name}: no commit has the code that dvc.lock names; run dvc repro")
    modules, trees = list(closures()[kind]["modules"]), (recorded, PRESENT)
    spaces = [_workspace(root, folder / which, stages[0]) for which in ("then", "now")]
    with ThreadPoolExecutor() as pool:
        before, after = pool.map(_replica, trees, spaces, [stages, stages], [modules, modules])
    for stage in stages:
        values = after["values"][stage.name]
        _same(stage, before["values"][stage.name], values)
        if kind == "train":
            _as_traced(root, stage, dict(values))
        found[stage.name] = Compared(_described(kind, values), commit)
    return (_sources(recorded, modules), _sources(PRESENT, modules)), after["executed"]


def _described(kind: str, values: list[list[str]]) -> list[str]:
    equal = f"{len(values)} values equal to the bit"
    if kind != "train":
        return [f"{equal}: every attack on the first {SAMPLES} test images, in chunks of {BATCH}"]
    places = dict.fromkeys(name.partition(":")[0] for name, _ in values if name.startswith("epoch"))
    return [f"{equal}: every parameter, statistic and loss", *places]


def _same(stage: Stale, before: list[list[str]], after: list[list[str]]) -> None:
    for old, new in zip(before, after, strict=False):
        if old != new:
            raise UserError(f"{stage.name}: {new[0]} differs from the recorded code's; run dvc repro")
    if len(before) != len(after):
        counts = f"{len(after)} values, {len(before)} in the recorded code"
        raise UserError(f"{stage.name}: {counts}; run dvc repro")


def _as_traced(root: Path, stage: Stale, found: dict[str, str]) -> None:
    """The first losses against ``trace.csv``, where this is the kind of machine that wrote it."""
    run = f"{stage.setting}/{stage.method}/{stage.seed}"
    hardware = (read_json(root, f"metrics/runs/train/{run}.json") or {}).get("hardware", {})
    if any(found[name] != _hash(hardware.get(name)) for name in ("cpu", "accelerator", "threads", "torch")):
        return
    for step, row in enumerate(read_csv(root, f"models/{run}/trace.csv")):
        for name, value in row.items():
            place = f"epoch 0, step {step}: {name}"
            if found.get(place, _hash(float(value))) != _hash(float(value)):
                raise UserError(f"{stage.name}: {place} is not what trace.csv has; run dvc repro")


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _workspace(root: Path, folder: Path, stage: Stale) -> Path:
    """A folder with params.yaml, and links to what the stage reads; evaluations are of a few images."""
    folder.mkdir(parents=True)
    values = yaml_files.parse((root / "params.yaml").read_text(encoding="utf-8"))
    if stage.kind in ("attack", "autoattack"):
        few = {"n": SAMPLES} if stage.kind == "attack" else {"n": [SAMPLES], "workers": 1}
        values["study"][stage.setting][stage.kind] |= {**few, "batch": BATCH}
    (folder / "params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    made = {path.split("/")[-1] for path in stage.outs}
    data = [path for path in (root / "data").iterdir() if path.name not in made]
    links = [root / "dvc.lock", root / "models", *data]
    if stage.kind == "tabulate":
        links += [root / "metrics" / name for name in ("attack", "autoattack", "sanity")]
    for path in filter(Path.exists, links):
        link = folder / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return folder


def _replica(tree: Path, space: Path, stages: list[Stale], modules: list[str]) -> Answer:
    """What ``stages`` compute with the code of ``tree`` in the workspace ``space``."""
    request = {"modules": modules, "stages": [stage._asdict() for stage in stages]}
    own = {"PYTHONPATH": str(tree), "DVC_ROOT": str(space)}
    done = subprocess.run(
        [sys.executable, "-P", str(REPLICA), "answer.json"],
        input=json.dumps(request),
        cwd=space,
        env={**os.environ, **own},
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
