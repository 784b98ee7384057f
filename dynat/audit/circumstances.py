"""How a stage was run, from ``metrics/runs``: hardware, versions, time, resumption, MLflow run."""

import os
import sqlite3
from pathlib import Path
from typing import Any

from dynat.audit.link import Link, absent, broken, good
from dynat.errors import UserError
from dynat.runtime.files import read_json

RERUN = "restore it with git checkout, or run dvc repro -f of that stage"


def circumstances(root: Path, stage: str, run: str, model_sha256: str) -> Link:
    """The record of one stage, such as train or attack, of ``run``, such as ``digits/dynat/0``.

    ``model_sha256`` is the weights' hash according to the metrics, empty if they state none.
    """
    name = f"metrics/runs/{stage}/{run}.json"
    try:
        record = read_json(root, name)
        if record is None:
            return absent("circumstances", name, "no record of this run")
        if fault := _fault(record, stage, run, model_sha256):
            return broken("circumstances", name, fault, RERUN)
        return _described(root, name, record, model_sha256)
    except UserError as error:
        return broken("circumstances", name, str(error), RERUN)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return broken("circumstances", name, f"not as the stages write it ({error!r})", RERUN)


def _fault(record: dict[str, Any], stage: str, run: str, model_sha256: str) -> str | None:
    setting, method, seed = run.split("/")
    kind, _, cell = record["stage"].partition("@")
    if kind.split("_")[0] != stage or (cell and cell != f"{setting}-{method}-{seed}"):
        return f"is the record of {record['stage']}"
    if str(record["seed"]) != seed:
        return f"is of the training seed {record['seed']}"
    if model_sha256 and record["model_sha256"] != model_sha256:
        return f"is of the weights {record['model_sha256'][:10]}, the metrics of {model_sha256[:10]}"
    return None


def _described(root: Path, name: str, record: dict[str, Any], model_sha256: str) -> Link:
    hardware, versions = record["hardware"], record["versions"]
    where = hardware["accelerator"] if hardware["accelerator"] != "none" else hardware["processor"]
    epoch = record.get("resumed_from_epoch")
    resumed = record.get("resumed", 0 if epoch is None else 1)
    times = "never resumed" if not resumed else f"resumed {resumed} time{'s' if resumed > 1 else ''}"
    parts = [
        f"{record['started'][:10]}, {record['seconds']:g} s on {where}",
        f"torch {versions['torch']}, python {versions['python']}",
        f"seed {record['seed']}",
        times if epoch is None else f"{times}, last at epoch {epoch}",
    ]
    if record.get("experiment"):
        parts.append(f"experiment {record['experiment']} on {str(record.get('baseline_rev'))[:10]}")
    run_id = record.get("mlflow_run_id")
    if not run_id:
        return good("circumstances", name, "; ".join([*parts, "no MLflow run"]))
    stored = _mlflow(root, run_id)
    if stored is None:
        parts.append(f"MLflow run {run_id[:10]} (not in a store at hand)")
    else:
        status, model = stored
        if status != "FINISHED" or model not in (None, model_sha256):
            text = f"its MLflow run {run_id} is {status}, of the weights {str(model)[:10]}"
            return broken("circumstances", name, text, RERUN)
        parts.append(f"MLflow run {run_id[:10]} found, finished, of these weights")
    return good(
        "circumstances", name, "; ".join(parts), [f"{k} {v}" for k, v in {**hardware, **versions}.items()]
    )


def _mlflow(root: Path, run_id: str) -> tuple[str, str | None] | None:
    """Status and ``model.sha256`` of a run in the SQLite store, read-only; None if it is not there.

    Importing MLflow takes seconds; its two tables have been the same for years.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.exists():
        return None
    try:
        store = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            run = store.execute("SELECT status FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
            query = "SELECT value FROM tags WHERE run_uuid = ? AND key = 'model.sha256'"
            tag = store.execute(query, (run_id,)).fetchone()
        finally:
            store.close()
    except sqlite3.Error:
        return None
    return (run[0], tag[0] if tag else None) if run else None
