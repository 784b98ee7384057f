"""Audited results as a Workflow Run RO-Crate 0.5 (needs the extra ``crate``: the package ``rocrate``).

``dvc.yaml`` is the workflow; a run of it is one action from ``params.yaml`` and code to the result files.
"""

from pathlib import Path
from typing import Any

from dynat.audit.link import Audited, sound
from dynat.audit.printed import Printed, kind_and_run
from dynat.config import yaml_files
from dynat.errors import UserError
from dynat.runtime.files import sha256

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
FORMATS = {".json": "application/json", ".md": "text/markdown", ".csv": "text/csv", ".html": "text/html"}
ABOUT = ("README.md", "CITATION.cff", "LICENSE")


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
    crate.metadata["conformsTo"] = [{"@id": "https://w3id.org/ro/crate/1.1"}, {"@id": [*PROFILES][-1]}]
    crate.name = "dynat: audited results"
    crate.description = f"{len(cells)} reproduced numbers of Dynamic Label Adversarial Training, their origin"
    workflow = _workflow(crate, root)
    results, records = _files(root, cells)
    values = []
    for key, cell in cells.items():
        verdict = "every link of its audit holds" if sound(found[key]) else "its audit found a broken link"
        about = {"name": key, "value": cell["text"], "description": verdict}
        values.append(_add(crate, f"#{key}", "PropertyValue", **about))
    run = _add(crate, "#run", "CreateAction", name="dvc repro", description="Run of the pipeline")
    run["instrument"], run["agent"] = workflow, crate.root_dataset["author"]
    inputs = [_file(crate, root, name) for name in ("params.yaml", "dvc.lock")]
    inputs[0]["exampleOfWork"] = workflow["input"]
    outputs = [_file(crate, root, name, exampleOfWork=workflow["output"]) for name in results]
    run["object"], run["result"] = inputs, [*outputs, *values]
    crate.root_dataset["mentions"] = run
    for name in (*records, *ABOUT):  # the records have times and machines
        _file(crate, root, name)
    try:
        crate.write(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None


def _workflow(crate: Any, root: Path) -> Any:
    """The main entity with its language, licence, author and two parameters."""
    dataset = crate.root_dataset
    citation = yaml_files.parse((root / "CITATION.cff").read_text(encoding="utf-8"))
    dataset["conformsTo"] = [
        _add(crate, url, "CreativeWork", name=name, version=url[-3:]) for url, name in PROFILES.items()
    ]
    licence = citation["license"]
    dataset["license"] = _add(crate, f"https://spdx.org/licenses/{licence}", "CreativeWork", name=licence)
    dataset["author"] = _add(crate, "#authors", "Organization", name=citation["authors"][0]["name"])
    kinds = ["File", "SoftwareSourceCode", "ComputationalWorkflow"]
    workflow = _file(crate, root, "dvc.yaml", **{"@type": kinds, "name": citation["title"]})
    workflow["license"] = dataset["license"]
    workflow["programmingLanguage"] = _add(crate, "https://dvc.org", "ComputerLanguage", name="DVC")
    for kind, text in (("input", "parameters of the study"), ("output", "metrics, verdicts and tables")):
        about = {"name": kind, "description": text, "additionalType": "File"}
        workflow[kind] = _add(crate, f"#{kind}", "FormalParameter", **about)
    crate.mainEntity = workflow
    return workflow


def _add(crate: Any, id_: str, type_: str, **properties: Any) -> Any:
    return crate.add_jsonld({"@id": id_, "@type": type_, **properties})


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
    behind = Printed(root).behind
    runs = [at for kind, run in map(kind_and_run, sources) for at in (*behind(run), (kind, run))]
    records = dict.fromkeys(f"metrics/runs/{stage}/{run}.json" for stage, run in runs)
    found = [name for name in records if (root / name).is_file()]
    return list(dict.fromkeys(["metrics/tables/cells.json", *tables, *results])), found
