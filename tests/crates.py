"""The validator of the Workflow Run RO-Crate profile, without a network."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTEXT = "https://w3id.org/ro/crate/1.1/context"
BIOSCHEMAS = "https://bioschemas.org/"
OF_1_1 = {  # the only terms of ours whose address is another one in 1.3, the version that rocrate ships
    "ComputationalWorkflow": f"{BIOSCHEMAS}ComputationalWorkflow",
    "FormalParameter": f"{BIOSCHEMAS}FormalParameter",
    "input": f"{BIOSCHEMAS}ComputationalWorkflow#input",
    "output": f"{BIOSCHEMAS}ComputationalWorkflow#output",
}


def faults(folder: Path, severity: str) -> list[str]:
    """What the validator rejects in a crate, down to ``severity`` (required, recommended)."""
    cache = folder.with_name(f"{folder.name}.http")
    remember(cache, CONTEXT, context())
    report = folder.with_name(f"{folder.name}.report.json")
    command = [str(Path(sys.executable).with_name("rocrate-validator")), "--no-interactive", "validate"]
    command += ["--offline", "--cache-path", str(cache), "--profile-identifier", "workflow-run-crate"]
    command += ["--requirement-severity", severity, "-f", "json", "-o", str(report), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert report.exists(), result.stdout + result.stderr
    found = json.loads(report.read_text())
    assert found["skipped_checks"] == 0, "the validator could not check everything"
    return [f"{issue['severity']}: {issue['message']}" for issue in found["issues"]]


def context() -> dict[str, Any]:
    """The JSON-LD context of RO-Crate 1.1, from the newer one inside the package rocrate."""
    import rocrate

    shipped = json.loads((Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_text())["@context"]
    del shipped["sha256"]  # came after 1.1
    return {"@context": shipped | OF_1_1}


def remember(cache: Path, url: str, document: dict[str, Any]) -> None:
    """Store a document in the validator's HTTP cache as if it had been fetched."""
    from requests import PreparedRequest, Response
    from requests.adapters import HTTPAdapter
    from requests_cache import CachedSession
    from urllib3 import HTTPResponse

    class Answer(HTTPAdapter):
        def send(self, request: PreparedRequest, *_: Any, **__: Any) -> Response:
            body = io.BytesIO(json.dumps(document).encode())
            kind = {"Content-Type": "application/ld+json"}
            return self.build_response(request, HTTPResponse(body, kind, 200, preload_content=False))

    with CachedSession(str(cache), backend="sqlite") as session:
        session.mount("https://", Answer())
        session.get(url)
