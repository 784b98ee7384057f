"""Cost beside accuracy: ``python -m dynat.cost`` writes ``metrics/runs/cost.md`` and ``cost.html``.

Hours, memory and energy are those of the records in ``metrics/runs``, accuracies are counted from the
verdicts as the tables count them. Nothing here is an output of the pipeline, for a time may not enter one.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from dynat.config.params import Params, load
from dynat.errors import UserError
from dynat.paper import figures
from dynat.paper.measurements import read_results
from dynat.paper.report import templates
from dynat.runtime.files import read_json, write_atomically
from dynat.runtime.stage import main

FOLDER = Path("metrics/runs")
STAGES = ("train", "attack", "autoattack")
COLUMNS = {"clean": "Clean, %", "pgd20": "PGD-20, %", "aa": "AA, %"}
Accuracies = dict[Any, float]  # mean in percent over the seeds
HEAD = [
    "Method",
    "Seeds",
    "Training, h",
    "Evaluation, h",
    "Memory, GiB",
    "Energy, kWh",
    *COLUMNS.values(),
    "Hardware",
]
INTRODUCTION = (
    "Means over the seeds. Hours are device hours, those of a run times its processes, each with a device of "
    "its own; ≥ marks a run that was stopped and resumed, of which only the last start is known. Memory is "
    "the peak, the largest of training and evaluation: tensors on a GPU, the whole process on a CPU. Energy "
    "is what the GPU took in all while they ran. Hours on different hardware do not compare."
)


def write(root: Path = Path()) -> None:
    """Write both files below ``root``; :class:`UserError` if no selected run has a record."""
    params = load(root / "params.yaml")
    records, accuracies = read_records(params, root), read_accuracies(params, root)
    if records.empty:
        raise UserError(f"{FOLDER}: no record of a selected run; dvc repro makes one with each run")
    tables = {setting: table_of(setting, params, records, accuracies) for setting in params.settings}
    page = templates().get_template("cost.html").render(introduction=INTRODUCTION, tables=tables)
    lines = ["# Cost beside accuracy", "", INTRODUCTION]
    for setting, table in tables.items():
        lines += ["", f"## {setting}", "", *markdown([HEAD, *table["rows"]])]
    write_atomically(root / FOLDER / "cost.md", ("\n".join(lines) + "\n").encode())
    write_atomically(root / FOLDER / "cost.html", page.encode())
    print(*lines, sep="\n")


def read_records(params: Params, root: Path) -> pd.DataFrame:
    """A row per record: setting, method, seed, stage, hours, whether resumed, bytes, joules, hardware."""
    rows = []
    methods = (*params.baselines, *params.variants)
    for stage, *run in product(STAGES, params.settings, methods, params.seeds):
        record = read_json(root, f"{FOLDER}/{stage}/{'/'.join(map(str, run))}.json")
        if record is None:
            continue
        hardware, processes = record["hardware"], record["processes"]
        gpu = hardware["accelerator"] != "none"
        rows.append(
            {
                **dict(zip(("setting", "method", "seed"), run, strict=True)),
                "stage": stage,
                "hours": record["seconds"] * processes / 3600,
                "resumed": record["resumed"] > 0,
                "bytes": record.get("peak_memory_bytes"),
                "joules": record.get("energy_joules"),
                "hardware": f"{processes} x {hardware['accelerator' if gpu else 'processor']}",
            }
        )
    return pd.DataFrame(rows)


def read_accuracies(params: Params, root: Path) -> Accuracies:
    """By setting, method and column of the tables; of what was measured alone."""
    measured = read_results(params, root).measurements
    shares = 100 * measured["robust"] / measured["n"]
    means = shares.groupby([measured[name] for name in ("setting", "method", "column")]).mean()
    return {key: float(mean) for key, mean in means.to_dict().items()}


def table_of(setting: str, params: Params, records: pd.DataFrame, accuracies: Accuracies) -> dict[str, Any]:
    """The rows of a setting, a method each, what was not run as a dash, and its figure or ""."""
    rows, points = [], dict[str, tuple[float, float]]()
    for method in (*params.baselines, *params.variants):
        own = records[(records["setting"] == setting) & (records["method"] == method)]
        training, evaluation = (own[(own["stage"] == "train") == first] for first in (True, False))
        rows.append(
            [
                method,
                str(own["seed"].nunique()),
                hours(training),
                hours(evaluation),
                text(own["bytes"].max() / 2**30, 2),
                text(own["joules"].sum(min_count=1) / own["seed"].nunique() / 3.6e6, 4),
                *(text(accuracies.get((setting, method, column)), 2) for column in COLUMNS),
                ", ".join(sorted(own["hardware"].unique())) or "—",
            ]
        )
        if len(training) and (setting, method, "aa") in accuracies:
            points[method] = training["hours"].mean(), accuracies[setting, method, "aa"]
    figure = figures.against_hours(f"cost-{setting}", points, {*params.variants}) if points else ""
    return {"head": HEAD, "rows": rows, "figure": figure}


def hours(records: pd.DataFrame) -> str:
    """The mean over seeds of the hours of all ``records`` of a seed."""
    if records.empty:
        return "—"
    least = "≥ " if records["resumed"].any() else ""
    return least + text(records.groupby("seed")["hours"].sum().mean(), 4)


def text(value: float | None, digits: int) -> str:
    """A number with so many digits after its point, a dash for none."""
    return "—" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "| --- |" + " --: |" * (len(rows[0]) - 2) + " --- |", *lines[1:]]


if __name__ == "__main__":
    main(write)
