"""Every file of the tabulate stage as text: tables, ``cells.json``, series of the plots. No torch here."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dynat.config.params import Params
from dynat.paper import published
from dynat.paper.cells import NUMBERS, cells_json, in_tables, paper_cells, setting_cells
from dynat.paper.markup import Table, markdown
from dynat.paper.measurements import CURVES, RUN, Results, read_results
from dynat.paper.tables import COLUMNS, paper_table, setting_tables

TABLES, PLOTS, REPORT = "metrics/tables", "metrics/plots", "metrics/report.html"
SUMMARY = ["clean", "pgd20", "cw", "aa"]
NUMBER = [*NUMBERS, "epsilon", "attack_seed", "caveats"]
SETTING = ["method", "checkpoint", "attack", "seed", *NUMBER, "cell"]
PAPER = ["target", "method", "attack", "published", "doubtful", *NUMBER, "difference", "notes", "cell"]


@dataclass(frozen=True)
class Tabulation:
    """All that the tables, the plots and the report print."""

    params: Params
    results: Results
    cells: pd.DataFrame  # of the settings, then of the paper; see dynat.paper.cells
    tables: dict[str, list[Table]]  # name of the file without suffix -> its tables


def tabulate(params: Params, root: Path = Path()) -> Tabulation:
    """Tabulate the selected results below ``root``; what was not run stays, empty.

    Raises :class:`UserError` on results that contradict their verdicts or each other.
    """
    results = read_results(params, root)
    cells = setting_cells(results.measurements)
    cells = pd.concat([cells, paper_cells(cells)])
    tables = {setting: setting_tables(setting, params, results, cells) for setting in params.settings}
    tables |= {f"table{number}": [paper_table(number, params, results, cells)] for number in published.TITLES}
    files: dict[str, list[str]] = {key: [] for key in cells.index}
    for file, each in tables.items():
        for key in {item.key for table in each for row in table.rows for item in row if item.key}:
            files[key] += [f"{TABLES}/{file}.md", REPORT]
    csv = TABLES + "/" + cells["table"] + ".csv"
    cells["tables"] = [[*files[key], csv[key]] for key in cells.index]
    return Tabulation(params, results, cells, tables)


def text_files(found: Tabulation) -> dict[str, str]:
    """File name -> content of the tables, ``cells.json`` and the plots; equal results give equal text."""
    files = {f"{TABLES}/{file}.md": markdown(tables) for file, tables in found.tables.items()}
    for setting in found.params.settings:
        files[f"{TABLES}/{setting}.csv"] = csv_text(setting_rows(setting, found), SETTING)
    for number in published.TITLES:
        files[f"{TABLES}/table{number}.csv"] = csv_text(paper_rows(number, found.cells), PAPER)
    files[f"{TABLES}/cells.json"] = cells_json(found.cells)
    files[f"{PLOTS}/training.csv"] = csv_text(found.results.histories, [*RUN, "epoch", *CURVES])
    ours = found.cells[found.cells["table"].isin(found.params.settings)]
    best = ours[~ours["column"].str.startswith("last-")].rename(columns={"column": "attack"})
    files[f"{PLOTS}/accuracy.csv"] = csv_text(best, [*RUN, "attack", "accuracy"])
    few = in_tables(ours[ours["column"].isin(SUMMARY)])
    for run, own in few.groupby(few["setting"] + "/" + few["method"], sort=False):
        means = own.set_index("column")["mean"].astype(float).reindex(SUMMARY).dropna().round(2)
        files[f"{TABLES}/summary/{run}.json"] = json.dumps(means.to_dict(), indent=1) + "\n"
    if len(radii := found.results.radii):
        digits = {"epsilon": "{:.6g}", "accuracy": "{:.4g}"}
        points = {column: radii[column].map(form.format) for column, form in digits.items()}
        files[f"{PLOTS}/epsilon.csv"] = csv_text(radii.assign(**points), [*RUN, *digits])
    return files


def setting_rows(setting: str, found: Tabulation) -> pd.DataFrame:
    """A row per method, checkpoint, attack and seed ("mean" after several); no accuracy if not run."""
    ours = found.cells[found.cells["table"] == setting].rename_axis("cell").reset_index()
    wanted = [
        (method, column)
        for method in (*found.params.baselines, *found.params.variants)
        for column in dict.fromkeys([*COLUMNS, *ours.loc[ours["method"] == method, "column"]])
    ]
    rows = pd.DataFrame(wanted, columns=["method", "column"]).merge(ours, how="left")
    last = rows["column"].str.startswith("last-")
    rows["checkpoint"] = last.map({True: "last", False: "best"})
    return rows.assign(attack=rows["column"].str.removeprefix("last-"))


def paper_rows(number: int, cells: pd.DataFrame) -> pd.DataFrame:
    """A row per published value, in the paper's order; no accuracy where nothing was run."""
    paper = published.values().rename(columns={"column": "attack"})
    paper = paper[paper["table"] == number]
    ours = cells.assign(cell=cells.index)[[*NUMBER, "difference", "cell"]]
    doubtful = paper["doubts"].map(lambda doubts: "yes" if doubts else "")
    return paper.join(ours).assign(doubtful=doubtful, notes=paper["notes"].map("; ".join))


def csv_text(rows: pd.DataFrame, columns: list[str]) -> str:
    """A CSV file with a header, also when there are no rows; what is missing is empty."""
    if "caveats" in columns:
        rows = rows.assign(caveats=rows["caveats"].map("; ".join, na_action="ignore"))
    return str(rows.to_csv(columns=columns, index=False, lineterminator="\n"))
