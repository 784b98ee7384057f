"""How a stage was run, from ``metrics/runs``: hardware, versions, time, resumption, MLflow run, proofs."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from dynat.audit.link import Link, absent, broken, good
from dynat.errors import UserError
from dynat.runtime.files import read_json

RERUN = "restore it with git checkout, or run dvc repro -f of that stage"
MLFLOW = """SELECT status, value FROM runs LEFT JOIN tags
    ON tags.run_uuid = runs.run_uuid AND key = 'model.sha256' WHERE runs.run_uuid = ?"""


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
        logged = _mlflow(root, record.get("mlflow_run_id") or "")
        status, tagged = logged or ("FINISHED", None)
        kind, _, cell = record["stage"].partition("@")
        weights, seed = record["model_sha256"], str(record["seed"])
        whole, method = run.replace("/", "-"), run.split("/")[1]
        # a stage of a checkpoint is called by its name alone, train_guide by its recipe
        named = (whole.replace("-guide-", "-"),) if kind == "train_guide" else (whole, method)
        for fault, now, wanted in (
            (f"is the record of {record['stage']}", kind.split("_")[0], stage),
            (f"is the record of {record['stage']}", cell in ("", *named), True),
            (f"is of the training seed {seed}", seed, run.rpartition("/")[2]),
            (f"is of the weights {weights[:10]}", weights, model_sha256 or weights),
            (f"its MLflow run is {status}, of the weights {str(tagged)[:10]}", status, "FINISHED"),
            (f"its MLflow run is {status}, of the weights {str(tagged)[:10]}", tagged, tagged and weights),
        ):
            if now != wanted:
                return [broken("circumstances", name, fault, RERUN)]
        return [_described(name, record, logged is not None), *_accepted(name, record, code)]
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        return [broken("circumstances", name, f"not as the stages write it ({error})", RERUN)]


def _mlflow(root: Path, run_id: str) -> tuple[str, str | None] | None:
    """Status and ``model.sha256`` of a run in the store here, or None; MLflow itself is slow."""
    store = f"{(root / 'mlflow.db').resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(store, uri=True)) as tables:
            found: tuple[str, str | None] | None = tables.execute(MLFLOW, (run_id,)).fetchone()
            return found
    except sqlite3.Error:
        return None


def _described(name: str, record: dict[str, Any], logged: bool) -> Link:
    hardware, versions = record["hardware"], record["versions"]
    where = hardware["accelerator"] if hardware["accelerator"] != "none" else hardware["processor"]
    epoch = record.get("resumed_from_epoch")
    resumed = record.get("resumed", 0)
    times = f"resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else "never resumed"
    run_id = record.get("mlflow_run_id") or ""
    store = "found, finished, of these weights" if logged else "(not in a store at hand)"
    parts = [
        f"{record['started'][:10]}, {record['seconds']:g} s on {where}",
        f"torch {versions['torch']}, python {versions['python']}",
        f"seed {record['seed']}",
        times if epoch is None else f"{times}, last at epoch {epoch}",
        f"MLflow run {run_id[:10]} {store}" if run_id else "no MLflow run",
    ]
    if record.get("node"):
        gpu = f", GPU {record['gpu']}" if record.get("gpu") else ""
        parts.insert(1, f"fleet node {record['node']}{gpu}, attempt {record['attempt']}")
    if record.get("experiment"):
        parts.append(f"experiment {record['experiment']} on {str(record.get('baseline_rev'))[:10]}")
    details = [f"{key} {value}" for key, value in {**hardware, **versions}.items()]
    return good("circumstances", name, "; ".join(parts), details)


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
