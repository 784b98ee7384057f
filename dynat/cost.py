"""Cost beside accuracy: ``python -m dynat.cost`` writes ``metrics/runs/cost.md`` and ``cost.html``.

Hours, memory and energy are those of the records in ``metrics/runs``, accuracies and their footnotes those of
the tables. Nothing here is an output of the pipeline, for a time may not enter one.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from dynat.config.params import Params, load
from dynat.errors import UserError
from dynat.paper import figures
from dynat.paper.claims import UNDECIDED
from dynat.paper.report import templates
from dynat.paper.tables import Item, Table, markdown
from dynat.paper.tabulation import Tabulation, tabulate
from dynat.runtime.files import read_json, write_atomically
from dynat.runtime.stage import main

FOLDER = Path("metrics/runs")
STAGES = ("train", "attack", "autoattack")
TRAINING, EVALUATION = STAGES[:1], STAGES[1:]
COSTS = ["Training (h)", "Training (device h)", "Evaluation (device h)", "Memory (GiB)"]
HEAD = ["Method", "Seeds", *COSTS, "Energy (kWh)", "Hardware"]
ACCURACIES = ("Clean", "PGD-20", "AA")  # headings of a setting's table
NONE = "—"
INTRODUCTION = (
    "Means over the seeds that have a record. Device hours are the hours of a run times its processes, each "
    "with a device of its own. Memory is the peak, the largest of training and evaluation: tensors on a GPU, "
    "the whole process on a CPU. Energy, of training and evaluation, is all that the GPUs took meanwhile. ≥: "
    "at least; of a run that was resumed only the last start is known, or not every record tells it. "
    "Hours on different devices do not compare."
)


def write(root: Path = Path()) -> None:
    """Write both files below ``root``; :class:`UserError` if no selected run has a record."""
    params = load(root / "params.yaml")
    found, records = tabulate(params, root), read_records(params, root)
    if records.empty:
        raise UserError(f"{FOLDER}: no record of a selected run; dvc repro (-f if all is done) makes them")
    tables = {s: [table_of(s, found, records), *undecided(s, found, records)] for s in params.settings}
    drawn = {setting: figure_of(setting, found, records) for setting in params.settings}
    page = templates().get_template("cost.html")
    html = page.render(introduction=INTRODUCTION, tables=tables, figures=drawn)
    text = f"# Cost beside accuracy\n\n{INTRODUCTION}\n"
    text += "".join(f"\n#{markdown(each)}" for each in tables.values())
    write_atomically(root / FOLDER / "cost.md", text.encode())
    write_atomically(root / FOLDER / "cost.html", html.encode())
    print(text)


def read_records(params: Params, root: Path) -> pd.DataFrame:
    """A row per record that is of the weights of the metrics, in the order of the selection.

    Setting, method, seed, stage; hours of the run and of its devices, whether it was resumed; bytes and
    joules, NaN where the record does not tell; the device, and how many of it. :class:`UserError` on a broken
    record.
    """
    rows = []
    for run, stage in product(params.runs, STAGES):
        name = "/".join(map(str, run))
        file = f"{FOLDER}/{stage}/{name}.json"
        try:
            metrics = [read_json(root, f"metrics/{kind}/{name}.json") for kind in EVALUATION]
            weights = {each["model_sha256"] for each in metrics if each}
            record = read_json(root, file)
            if record is not None and weights <= {record["model_sha256"]}:
                rows.append([*run, stage, *_costs(record)])
        except (KeyError, TypeError, ValueError) as error:
            text = f"{file}: not as the stages write it ({error!r}); run dvc repro -f of that stage"
            raise UserError(text) from None
    names = ["setting", "method", "seed", "stage", "hours", "device_hours", "resumed", "bytes", "joules"]
    kinds = dict.fromkeys(("hours", "device_hours", "bytes", "joules"), float)
    return pd.DataFrame(rows, columns=[*names, "device", "hardware"]).astype(kinds)


def _costs(record: dict[str, Any]) -> tuple[float | bool | str | None, ...]:
    hours, processes, hardware = record["seconds"] / 3600, record["processes"], record["hardware"]
    device = hardware["accelerator"] if hardware["accelerator"] != "none" else hardware["processor"]
    measured = record.get("peak_memory_bytes"), record.get("energy_joules")
    return hours, hours * processes, record["resumed"] > 0, *measured, device, f"{processes} × {device}"


def table_of(setting: str, found: Tabulation, records: pd.DataFrame) -> Table:
    """The table of a setting: a row per method as in its table of accuracies, a dash for what was not run."""
    chosen, ours = found.tables[setting][0], records[records["setting"] == setting]
    places = [i for i, head in enumerate(chosen.head) if head.partition(" (")[0] in ACCURACIES]
    text = f"Accuracies are those of `metrics/tables/{setting}.md`, in percent."
    if ours["device"].nunique() > 1:
        text += " These runs were made on different devices: their hours do not compare."
    if found.params.distilled:
        text += " Training leaves out that of the frozen guide which a method learns from."
    if missing := _missing(setting, found.params, ours):
        text += f" No record of these weights: {', '.join(missing)}."
    table = Table(setting, text, [*HEAD[:-1], *(chosen.head[i] for i in places), HEAD[-1]])
    for row in chosen.rows:
        own = ours[ours["method"] == row[0].text]
        known: tuple[str, ...] = STAGES
        if row[0].text in found.params.checkpoint:  # trained elsewhere
            known = EVALUATION
        costs = [
            str(own["seed"].nunique()),
            _mean(own, "hours", TRAINING),
            _mean(own, "device_hours", TRAINING),
            _mean(own, "device_hours", EVALUATION),
            _peak(own, known),
            _mean(own.assign(kwh=own["joules"] / 3.6e6), "kwh", known),
        ]
        accuracies = [replace(row[i], text=row[i].text or NONE, key=None) for i in places]
        table.rows.append([row[0], *map(Item, costs), *accuracies, Item(_hardware(own))])
    return table


def undecided(setting: str, found: Tabulation, records: pd.DataFrame) -> list[Table]:
    """What a further training seed of all methods of each undecided claim costs; empty if all are decided."""
    text = "What one more training seed of the methods compared would cost, in device hours of training and "
    text += "evaluation, going by the records. How many seeds or images decide: `metrics/tables/claims.md`."
    table = Table(f"{setting}, undecided claims", text, ["Claim", "Methods", "A further seed (device h)"])
    ours = records[records["setting"] == setting]
    for each in found.decisions:
        if each.setting == setting and each.verdict == UNDECIDED:
            methods = dict.fromkeys(method for a, b, _ in each.found for method in (a, b))
            hours = [_mean(ours[ours["method"] == method], "device_hours", STAGES) for method in methods]
            least = "≥ " if any("≥" in one for one in hours) else ""
            total = NONE if NONE in hours else f"{least}{sum(float(one.strip('≥ ')) for one in hours):.4f}"
            table.rows.append([Item(each.claim), Item(", ".join(methods)), Item(total)])
    return [table] if table.rows else []


def figure_of(setting: str, found: Tabulation, records: pd.DataFrame) -> str:
    """AutoAttack accuracy against device hours of training, a mean over seeds each; empty without both."""
    cells = found.cells[(found.cells["row"] == setting) & (found.cells["column"] == "aa")]
    robust = cells.set_index("method")["mean"].astype(float)
    trained = records[(records["setting"] == setting) & (records["stage"] == "train")]
    points = trained.groupby("method", sort=False)["device_hours"].mean().to_frame().join(robust, how="inner")
    devices = trained.groupby("method")["device"].unique()
    resumed = trained.loc[trained["resumed"], "method"].array
    points["label"] = [
        method
        + (f", {' and '.join(devices[method])}" if trained["device"].nunique() > 1 else "")
        + (" (at least)" if method in resumed else "")
        for method in points.index
    ]
    return figures.against_hours(f"cost-{setting}", points, {*found.params.variants}) if len(points) else ""


def _missing(setting: str, params: Params, records: pd.DataFrame) -> list[str]:
    """What has no record: a run, such as ``dynat/0``, or some stages of it."""
    known = {*records[["method", "seed", "stage"]].itertuples(index=False, name=None)}
    missing = []
    for run in (each[1:] for each in params.runs if each[0] == setting):
        needed = EVALUATION if run[0] in params.checkpoint else STAGES
        stages = [stage for stage in needed if (*run, stage) not in known]
        which = f"{' and '.join(stages)} of " if len(stages) < len(needed) else ""
        missing += [f"{which}{run[0]}/{run[1]}"] if stages else []
    return missing


def _mean(records: pd.DataFrame, column: str, stages: tuple[str, ...]) -> str:
    """The mean over seeds of the sum over ``stages``, with ≥ where part of it is not known."""
    own = records[records["stage"].isin(stages) & records[column].notna()]
    sums = own.groupby("seed")[column].sum()
    if own.empty:
        return NONE
    least = len(own) < len(sums) * len(stages) or own["resumed"].any()
    return f"{'≥ ' if least else ''}{sums.mean():.4f}"


def _peak(records: pd.DataFrame, stages: tuple[str, ...]) -> str:
    """The largest peak of all records in GiB, with ≥ where part of it is not known."""
    own = records[records["bytes"].notna()]
    if own.empty:
        return NONE
    least = len(own) < records["seed"].nunique() * len(stages) or own["resumed"].any()
    return f"{'≥ ' if least else ''}{own['bytes'].max() / 2**30:.2f}"


def _hardware(records: pd.DataFrame) -> str:
    """The number and name of the devices, with the stages that ran there if not all ran on the same."""
    stages = records.groupby("hardware", sort=False)["stage"].unique().map(", ".join).to_dict()
    return (
        "; ".join(f"{name} ({of})" if len(stages) > 1 else str(name) for name, of in stages.items()) or NONE
    )


if __name__ == "__main__":
    main(write)
