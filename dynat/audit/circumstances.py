"""How a stage was run, from ``metrics/runs``: hardware, versions, time, resumption, MLflow run, proofs."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from dynat.audit.link import Link, absent, broken, good
from dynat.errors import UserError
from dynat.runtime.files import read_json

RERUN = "restore it with git checkout, or run dvc repro -f of that stage"


def circumstances(root: Path, stage: str, run: str, model_sha256: str, code: str) -> list[Link]:
    """The record of one stage, such as train or attack, of ``run``, such as ``digits/dynat/0``.

    ``model_sha256`` is the weights' hash according to the metrics, ``code`` the MD5 of the stage's closure
    according to ``dvc.lock``; both empty where there is none.
    """
    name = f"metrics/runs/{stage}/{run}.json"
    try:
        record = read_json(root, name)
        if record is None:
            return [absent("circumstances", name, "no record of this run")]
        if fault := _fault(record, stage, run, model_sha256):
            return [broken("circumstances", name, fault, RERUN)]
        return [_described(root, name, record, model_sha256), *_accepted(name, record, code)]
    except UserError as error:
        return [broken("circumstances", name, str(error), RERUN)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [broken("circumstances", name, f"not as the stages write it ({error!r})", RERUN)]


def _fault(record: dict[str, Any], stage: str, run: str, model_sha256: str) -> str | None:
    kind, _, cell = record["stage"].partition("@")
    if kind.split("_")[0] != stage or (cell and cell != run.replace("/", "-")):
        return f"is the record of {record['stage']}"
    if str(record["seed"]) != run.rpartition("/")[2]:
        return f"is of the training seed {record['seed']}"
    if model_sha256 and record["model_sha256"] != model_sha256:
        return f"is of the weights {record['model_sha256'][:10]}, the metrics of {model_sha256[:10]}"
    return None


def _described(root: Path, name: str, record: dict[str, Any], model_sha256: str) -> Link:
    hardware, versions = record["hardware"], record["versions"]
    where = hardware["accelerator"] if hardware["accelerator"] != "none" else hardware["processor"]
    epoch = record.get("resumed_from_epoch")
    resumed = record.get("resumed", 0 if epoch is None else 1)
    times = f"resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else "never resumed"
    parts = [
        f"{record['started'][:10]}, {record['seconds']:g} s on {where}",
        f"torch {versions['torch']}, python {versions['python']}",
        f"seed {record['seed']}",
        times if epoch is None else f"{times}, last at epoch {epoch}",
    ]
    if record.get("experiment"):
        parts.append(f"experiment {record['experiment']} on {str(record.get('baseline_rev'))[:10]}")
    run_id = record.get("mlflow_run_id") or ""
    if stored := _mlflow(root, run_id):
        status, model = stored
        if status != "FINISHED" or model not in (None, model_sha256):
            text = f"its MLflow run {run_id} is {status}, of the weights {str(model)[:10]}"
            return broken("circumstances", name, text, RERUN)
        parts.append(f"MLflow run {run_id[:10]} found, finished, of these weights")
    else:
        parts.append(f"MLflow run {run_id[:10]} (not in a store at hand)" if run_id else "no MLflow run")
    details = [f"{key} {value}" for key, value in {**hardware, **versions}.items()]
    return good("circumstances", name, "; ".join(parts), details)


def _mlflow(root: Path, run_id: str) -> tuple[str, str | None] | None:
    """Status and ``model.sha256`` of a run in the SQLite store, read-only; None if it is not there.

    Importing MLflow takes seconds; its two tables have been the same for years.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.exists():
        return None
    query = (
        "SELECT status, value FROM runs LEFT JOIN tags"
        " ON tags.run_uuid = runs.run_uuid AND key = 'model.sha256' WHERE runs.run_uuid = ?"
    )
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as store:
            found: tuple[str, str | None] | None = store.execute(query, (run_id,)).fetchone()
            return found
    except sqlite3.Error:
        return None


def _accepted(name: str, record: dict[str, Any], code: str) -> Iterator[Link]:
    """A link per proof by which ``dvc.lock`` came from the code that ran to the code it records."""
    proofs = {proof["code"]: proof for proof in record.get("accepted", ())}
    if proofs and code not in {*proofs, *(proof["from"] for proof in proofs.values())}:
        yield broken("accepted", name, f"no proof in it is of the code {code[:8]} in dvc.lock", RERUN)
    while proof := proofs.pop(code, None):
        code, compared = proof["from"], proof["compared"]
        text = (
            f"accepted on {proof['date'][:10]} at commit {proof['commit'][:10]}: this code was not run; "
            f"it gave the same bits as the recorded code {code[:8]} in {', '.join(compared)}"
        )
        yield Link("accepted", name, "accepted", text)
    if record.get("code", code) != code:  # an earlier output, which DVC took from its run cache
        yield absent("circumstances", name, f"of a run with other code ({record['code'][:8]})", RERUN)
