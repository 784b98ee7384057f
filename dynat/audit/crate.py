"""Audited results as a Workflow Run RO-Crate 0.5 (needs the extra ``crate``: the package ``rocrate``).

``dvc.yaml`` is the workflow; a run of it is one action from ``params.yaml`` and code to the result files.
"""

import hashlib
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from dynat.audit.link import Link, sound
from dynat.errors import UserError

RUN = "https://w3id.org/ro/wfrun"
PROFILES = {
    f"{RUN}/process/0.5": "Process Run Crate",
    f"{RUN}/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
FORMATS = {".json": "application/json", ".md": "text/markdown", ".csv": "text/csv", ".html": "text/html"}


def export(root: Path, folder: Path, cells: dict[str, dict[str, Any]], found: dict[str, list[Link]]) -> None:
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
    crate.description = (
        f"{len(cells)} reproduced numbers of Dynamic Label Adversarial Training and their origin"
    )
    workflow = _workflow(crate, root)
    inputs = [_file(crate, root, name) for name in ("params.yaml", "dvc.lock")]
    inputs[0]["exampleOfWork"] = workflow["input"]
    results, records = _results(root, cells)
    outputs = [_file(crate, root, name) for name in results]
    for each in outputs:
        each["exampleOfWork"] = workflow["output"]
    for name in records:
        _file(crate, root, name)
    values = [_value(crate, key, cell, found[key]) for key, cell in cells.items()]
    action = crate.add_action(
        workflow,
        "#run",
        object=inputs,
        result=[*outputs, *values],
        properties={"name": "dvc repro", "description": "Run of the pipeline", **_times(root, records)},
    )
    action["agent"] = crate.root_dataset["author"]
    crate.root_dataset["mentions"] = action
    for name in ("CITATION.cff", "LICENSE"):
        _file(crate, root, name)
    _file(crate, root, "README.md")["about"] = crate.root_dataset
    try:
        crate.write(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None


def _workflow(crate: Any, root: Path) -> Any:
    """The main entity, its language and its two parameters."""
    from rocrate.model.computerlanguage import ComputerLanguage
    from rocrate.model.contextentity import ContextEntity

    licence = "https://spdx.org/licenses/MIT"
    crate.add(ContextEntity(crate, licence, {"@type": "CreativeWork", "name": "MIT License"}))
    crate.license = {"@id": licence}
    profiles = [
        crate.add(ContextEntity(crate, url, {"@type": "CreativeWork", "name": name, "version": url[-3:]}))
        for url, name in PROFILES.items()
    ]
    language = {"name": "DVC", "alternateName": "dvc.yaml", "url": {"@id": "https://dvc.org"}}
    dvc = crate.add(ComputerLanguage(crate, "#dvc", properties=language))
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    authors = {"@type": "Organization", "name": citation["authors"][0]["name"]}
    crate.root_dataset["author"] = crate.root_dataset["publisher"] = crate.add(
        ContextEntity(crate, "#authors", authors)
    )
    own = {
        "name": citation["title"],
        "version": citation["version"],
        "license": {"@id": licence},
        "encodingFormat": "application/yaml",
        "conformsTo": {"@id": "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"},
    }
    if "repository-code" in citation:
        own["url"] = {"@id": citation["repository-code"]}
    workflow = crate.add_workflow(root / "dvc.yaml", "dvc.yaml", properties=own, main=True, lang=dvc)
    crate.root_dataset["conformsTo"] = profiles
    for kind, text in (("input", "parameters of the study"), ("output", "metrics, verdicts and tables")):
        properties = {"conformsTo": {"@id": "https://bioschemas.org/profiles/FormalParameter/1.0-RELEASE"}}
        parameter = crate.add_formal_parameter(
            kind, "File", identifier=f"#{kind}", description=text, properties=properties
        )
        workflow[kind] = parameter
    return workflow


def _file(crate: Any, root: Path, name: str) -> Any:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name}: lies outside the repository and is not exported; run dvc repro tabulate")
    if not path.is_file():
        raise UserError(f"{name}: missing, so there is nothing to export; run dvc repro")
    data = path.read_bytes()
    properties = {
        "name": name,
        "contentSize": str(len(data)),
        "sha256": hashlib.sha256(data).hexdigest(),
        "encodingFormat": FORMATS.get(path.suffix, "text/plain"),
    }
    return crate.add_file(path, name, properties=properties)


def _results(root: Path, cells: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Files with the numbers, and the run records that are there."""
    results = dict.fromkeys(["metrics/tables/cells.json"])
    records: dict[str, None] = {}
    for cell in cells.values():
        results |= dict.fromkeys(cell["tables"])
        for source in cell["sources"]:
            results |= dict.fromkeys([source["file"], source["verdicts"]])
            _, kind, run = source["file"].split("/", 2)
            wanted = [f"metrics/runs/{stage}/{run}" for stage in ("train", kind)]
            records |= dict.fromkeys(name for name in wanted if (root / name).is_file())
    return list(results), list(records)


def _value(crate: Any, key: str, cell: dict[str, Any], links: list[Link]) -> Any:
    """A printed number and the outcome of its audit."""
    from rocrate.model.contextentity import ContextEntity

    verdict = "every link of its audit holds" if sound(links) else "its audit found a broken link"
    properties = {"@type": "PropertyValue", "name": key, "value": cell["text"], "description": verdict}
    return crate.add(ContextEntity(crate, f"#{key}", properties=properties))


def _times(root: Path, records: list[str]) -> dict[str, str]:
    """Start of the first and end of the last recorded stage."""
    starts, ends = [], []
    for name in records:
        record = json.loads((root / name).read_text(encoding="utf-8"))
        start = datetime.fromisoformat(record["started"])
        starts.append(start)
        ends.append(start + timedelta(seconds=record["seconds"]))
    if not starts:
        return {}
    return {"startTime": min(starts).isoformat(), "endTime": max(ends).isoformat(timespec="seconds")}
