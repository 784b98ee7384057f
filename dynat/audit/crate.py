"""Audited results as a Workflow Run RO-Crate 0.5 (needs the extra ``crate``: the package ``rocrate``).

``dvc.yaml`` is the workflow; a run of it is one action from ``params.yaml`` and code to the result files.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from dynat.audit.link import Audited, sound
from dynat.audit.selection import kind_and_run
from dynat.errors import UserError
from dynat.runtime.files import sha256

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
BIOSCHEMAS = "https://bioschemas.org/profiles"
LICENCE = "https://spdx.org/licenses/MIT"
FORMATS = {".json": "application/json", ".md": "text/markdown", ".csv": "text/csv", ".html": "text/html"}


def export(root: Path, folder: Path, cells: dict[str, dict[str, Any]], found: Audited) -> None:
    """Write the files behind the audited ``cells``, and what the audit found, to the new ``folder``.

    Raises :class:`UserError` if the folder is not empty, a file is missing or ``rocrate`` is not there.
    """
    try:
        from rocrate.rocrate import ROCrate
    except ImportError:
        raise UserError("--crate needs the package rocrate; install it with uv sync --extra crate") from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; name a new folder")
    crate = ROCrate(version="1.1")  # on which these profiles build
    crate.metadata.extra_terms["sha256"] = "https://w3id.org/ro/terms/workflow-run#sha256"
    crate.name = "dynat: audited results"
    text = f"{len(cells)} reproduced numbers of Dynamic Label Adversarial Training and their origin"
    crate.description = text
    workflow = _workflow(crate, root)
    inputs = [_file(crate, root, name) for name in ("params.yaml", "dvc.lock")]
    inputs[0]["exampleOfWork"] = workflow["input"]
    results, records = _files(root, cells)
    outputs = [_file(crate, root, name, exampleOfWork=workflow["output"]) for name in results]
    for name in records:
        _file(crate, root, name)
    values = [_value(crate, key, cell["text"], sound(found[key])) for key, cell in cells.items()]
    action = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": "dvc repro",
        "description": "Run of the pipeline",
    }
    if records:
        starts, ends = zip(*(_time(root / name) for name in records), strict=True)
        action |= {"startTime": min(starts).isoformat(), "endTime": max(ends).isoformat(timespec="seconds")}
    run = crate.root_dataset["mentions"] = crate.add_jsonld(action)
    run["instrument"], run["agent"] = workflow, crate.root_dataset["author"]
    run["object"], run["result"] = inputs, [*outputs, *values]
    for name in ("CITATION.cff", "LICENSE"):
        _file(crate, root, name)
    _file(crate, root, "README.md")["about"] = crate.root_dataset
    try:
        crate.write(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None


def _workflow(crate: Any, root: Path) -> Any:
    """The main entity, its language, licence, authors and two parameters."""
    dataset, citation = (
        crate.root_dataset,
        yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8")),
    )

    def add(id_: str, type_: str, **properties: Any) -> Any:
        return crate.add_jsonld({"@id": id_, "@type": type_, **properties})

    dataset["conformsTo"] = [
        add(url, "CreativeWork", name=name, version=url[-3:]) for url, name in PROFILES.items()
    ]
    dataset["license"] = add(LICENCE, "CreativeWork", name="MIT License")
    dataset["author"] = add("#authors", "Organization", name=citation["authors"][0]["name"])
    dataset["publisher"] = dataset["author"]
    workflow = _file(
        crate,
        root,
        "dvc.yaml",
        **{"@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"]},
        name=citation["title"],
        version=citation["version"],
        encodingFormat="application/yaml",
        conformsTo={"@id": f"{BIOSCHEMAS}/ComputationalWorkflow/1.0-RELEASE"},
    )
    workflow["license"] = dataset["license"]
    dvc = {"name": "DVC", "alternateName": "dvc.yaml", "url": {"@id": "https://dvc.org"}}
    workflow["programmingLanguage"] = add("#dvc", "ComputerLanguage", **dvc)
    if "repository-code" in citation:
        workflow["url"] = {"@id": citation["repository-code"]}
    for kind, text in (("input", "parameters of the study"), ("output", "metrics, verdicts and tables")):
        parameter = add(f"#{kind}", "FormalParameter", name=kind, description=text, additionalType="File")
        parameter["conformsTo"] = {"@id": f"{BIOSCHEMAS}/FormalParameter/1.0-RELEASE"}
        workflow[kind] = parameter
    crate.mainEntity = workflow
    crate.metadata["conformsTo"] = [{"@id": "https://w3id.org/ro/crate/1.1"}, {"@id": [*PROFILES][-1]}]
    return workflow


def _file(crate: Any, root: Path, file: str, **properties: Any) -> Any:
    path = root / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{file}: lies outside the repository and is not exported; run dvc repro tabulate")
    if not path.is_file():
        raise UserError(f"{file}: missing, so there is nothing to export; run dvc repro")
    kind = FORMATS.get(path.suffix, "text/plain")
    about = {"name": file, "sha256": sha256(path), "encodingFormat": kind, **properties}
    return crate.add_file(path, file, properties=about, record_size=True)


def _files(root: Path, cells: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Files with the numbers, and the run records that are there."""
    sources = [source for cell in cells.values() for source in cell["sources"]]
    results = [name for source in sources for name in (source["file"], source["verdicts"])]
    tables = [name for cell in cells.values() for name in cell["tables"]]
    runs = [(stage, run) for kind, run in map(kind_and_run, sources) for stage in ("train", kind)]
    records = dict.fromkeys(f"metrics/runs/{stage}/{run}.json" for stage, run in runs)
    found = [name for name in records if (root / name).is_file()]
    return list(dict.fromkeys(["metrics/tables/cells.json", *tables, *results])), found


def _value(crate: Any, key: str, text: str, holds: bool) -> Any:
    """A printed number and the outcome of its audit."""
    verdict = "every link of its audit holds" if holds else "its audit found a broken link"
    number = {"@id": f"#{key}", "@type": "PropertyValue", "name": key, "value": text, "description": verdict}
    return crate.add_jsonld(number)


def _time(path: Path) -> tuple[datetime, datetime]:
    """Start and end of a recorded stage."""
    record = json.loads(path.read_text(encoding="utf-8"))
    start = datetime.fromisoformat(record["started"])
    return start, start + timedelta(seconds=record["seconds"])
