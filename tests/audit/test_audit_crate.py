"""The Workflow Run RO-Crate of audited numbers."""

import hashlib
import json
from pathlib import Path

import crates
import pytest
from tampering import ATTACK, CELL

from dynat.audit.__main__ import main

pytest.importorskip("rocrate", reason="needs the extra crate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning"),  # of a package that DVC uses
]


def test_crate_links_the_run_to_every_result_file_by_its_hash(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crate"
    assert main([CELL, "--crate", str(folder)]) == 0
    graph = json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    root = entities["./"]
    assert {"@id": "https://w3id.org/ro/wfrun/workflow/0.5"} in root["conformsTo"]
    action = entities[root["mentions"]["@id"]]
    assert action["instrument"] == root["mainEntity"] == {"@id": "dvc.yaml"}
    results = [entities[result["@id"]] for result in action["result"]]
    files = [result for result in results if result["@type"] == "File"]
    assert f"{ATTACK}.verdicts.json" in {file["@id"] for file in files}
    for file in files:
        content = (finished / file["@id"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert (folder / file["@id"]).read_bytes() == content
    assert main([CELL, "--crate", str(folder)]) == 2  # not empty any more


def test_the_profiles_validator_accepts_the_crate_and_no_spoilt_one(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("rocrate_validator", reason="needs roc-validator of the group dev")
    folder = tmp_path / "crate"
    assert main(["--all", "--crate", str(folder)]) == 0
    assert crates.faults(folder, "required") == []
    metadata = folder / "ro-crate-metadata.json"
    whole = json.loads(metadata.read_text())
    for entity, key in (("#run", "instrument"), ("./", "mainEntity"), ("dvc.yaml", "programmingLanguage")):
        graph = [
            {name: value for name, value in each.items() if each["@id"] != entity or name != key}
            for each in whole["@graph"]
        ]
        metadata.write_text(json.dumps({**whole, "@graph": graph}))
        assert crates.faults(folder, "required"), f"{entity} without {key}"


def test_crate_takes_no_file_from_outside_the_repository(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    path = repository / "metrics/tables/cells.json"
    found = json.loads(path.read_text())
    found[CELL]["sources"][0]["verdicts"] = "../secret"
    path.write_text(json.dumps(found))
    assert main([CELL, "--crate", str(tmp_path / "crate")]) == 2
    assert not (tmp_path / "crate").exists()
