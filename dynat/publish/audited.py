"""What is published: weights, metrics and data of a run whose audit holds."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynat.audit.checks import audit
from dynat.audit.lineage import Lineage
from dynat.audit.link import Audited, as_data
from dynat.audit.printed import Printed
from dynat.audit.selection import select
from dynat.config.params import Params, Study
from dynat.data.splits import Splits, load
from dynat.errors import UserError
from dynat.evaluation.verdicts import Accuracy, accuracy
from dynat.networks.weights import load_network, load_weights
from dynat.paper.measurements import IN_AA, Measurement, read_results
from dynat.paper.tables import HERE
from dynat.runtime.files import read_json, sha256, write_json

CPU = torch.device("cpu")


class Result(NamedTuple):
    """An accuracy of the published weights."""

    measured: Measurement
    counted: Accuracy  # in percent, with its 95 % Wilson interval
    precision: str  # in which the attack was crafted; every success is verified in fp32
    warnings: list[str]  # what must stand beside the number


@dataclass(frozen=True)
class Release:
    """A run, ``setting/method/seed``, that the audit holds; files are read when they are asked for."""

    root: Path
    name: str
    params: Params
    cells: dict[str, dict[str, Any]]  # the audited cells of the tables
    found: Audited

    @property
    def setting(self) -> str:
        """The first word of the name."""
        return self.name.split("/")[0]

    @property
    def method(self) -> str:
        """The second word of the name."""
        return self.name.split("/")[1]

    @property
    def study(self) -> Study:
        """The setting's entry of params.yaml."""
        return self.params.study[self.setting]

    @property
    def weights(self) -> Path:
        """The file of the target at its best epoch."""
        return self.root / "models" / self.name / "target.safetensors"

    @cached_property
    def network(self) -> nn.Module:
        """The target in eval mode on the CPU: images float32 [N,C,H,W] in [0,1] to logits [N,classes]."""
        return load_network(self.weights, CPU)[0].to(memory_format=torch.contiguous_format)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Name and options of the network, as ``dynat.networks.architectures.build`` takes them."""
        return dict(json.loads(load_weights(self.weights)[1]["network"]))

    @cached_property
    def data(self) -> Splits:
        """The prepared images; a :class:`UserError` where they are not here."""
        return load(self.root / "data" / f"{self.setting}.safetensors", CPU)

    @cached_property
    def results(self) -> list[Result]:
        """Every accuracy of the best epoch, but AutoAttack's first attack alone."""
        results = read_results(self.params, self.root)
        seed = f"(seed {self.name.split('/')[2]})"
        checks = results.failed_checks.get((self.setting, self.method), [])
        failed = [each for each in checks if each.endswith(seed)]
        found = []
        for row in results.measurements.itertuples(index=False):
            measured = Measurement._make(row)
            own = "/".join(map(str, row[:3])) == self.name and measured.column != IN_AA
            if own and measured.checkpoint == "best":
                counted = accuracy([i < measured.robust for i in range(measured.n)])
                metrics = read_json(self.root, measured.file) or {}
                precision = metrics.get("precision", "fp32")
                found.append(Result(measured, counted, precision, [*measured.caveats, *failed]))
        return found

    def record(self) -> dict[str, Any]:
        """The record of the training, empty if there is none."""
        return read_json(self.root, f"metrics/runs/train/{self.name}.json") or {}

    def adversarial(self) -> list[tuple[str, Tensor, Tensor]]:
        """Of each stored attack its name, samples int64 [b] and adversarial images float32 [b,C,H,W].

        Raises :class:`UserError` where a file of them is not here.
        """
        found = []
        for kind in ("attack", "autoattack"):
            path = self.root / "metrics" / kind / f"{self.name}.witness.safetensors"
            if not path.exists() and any(each.measured.kind == kind for each in self.results):
                raise UserError(f"{path}: not here; run dvc repro, or dvc pull from your remote")
            tensors = load_weights(path)[0] if path.exists() else {}
            for key in sorted(tensors):
                if match := re.fullmatch(r"best/(.*)/indices", key):
                    images = tensors[f"best/{match[1]}/images"]
                    found.append((f"{kind} {match[1]}", tensors[key], images))
        return found

    @property
    def guide(self) -> dict[str, str] | None:
        """The run of the frozen guide that the weights learned from, and who trained that."""
        setting, method, seed = self.name.split("/")
        found = self.params.guide_run(method, int(seed))
        if found is None:
            return None
        given = self.params.checkpoint.get(found[0])
        origin = given.origin if given else HERE
        return {"run": f"{setting}/{found[0]}/{found[1]}", "origin": origin}

    @property
    def summary(self) -> str:
        """A line on the audit."""
        unknown = {link for links in self.found.values() for link in links if link.state == "absent"}
        return f"{len(self.cells)} audited numbers hold, {len(unknown)} links could not be checked here"


def audited(root: Path, name: str) -> Release:
    """The run ``setting/method/seed`` if the audit holds all of its numbers.

    Raises :class:`UserError` for a name that is none, a broken link, or weights that are not here.
    """
    if not re.fullmatch(r"[^/]+/[^/]+/\d+", name):
        raise UserError(f"{name}: name a run as setting/method/seed, such as digits/dynat/0")
    printed, lineage = Printed(root), Lineage(root)
    keys = [key for key in select(printed, lineage, name) if key.startswith(f"{name}/")]
    if not keys:
        raise UserError(f"{name}: no such run among the tables; run dvc repro with it selected")
    found = audit(printed, lineage, keys)
    broken = [link for links in found.values() for link in links if link.state == "broken"]
    if broken:
        text = f"{name} is not published, for its audit does not hold: {broken[0].line[2:]}"
        raise UserError(f"{text} (python -m dynat.audit {name} has all)")
    release = Release(root, name, printed.params, {key: printed.cells[key] for key in keys}, found)
    if not release.weights.exists():
        raise UserError(f"{release.weights}: not here; run dvc repro, or dvc pull from your remote")
    return release


def write_lineage(release: Release, folder: Path) -> None:
    """Write ``lineage.json``: the weights' hash, their guide, what the audit found of every number."""
    metadata = load_weights(release.weights)[1]
    write_json(
        folder / "lineage.json",
        {
            "run": release.name,
            "weights": {
                "file": release.weights.relative_to(release.root).as_posix(),
                "sha256": sha256(release.weights),
                "epoch": int(metadata["epoch"]) if "epoch" in metadata else None,
                "origin": metadata.get("origin", HERE),
            },
            "guide": release.guide,
            "mlflow_run_id": release.record().get("mlflow_run_id"),
            "audit": as_data(release.cells, release.found),
        },
    )
