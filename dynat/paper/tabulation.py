"""Every file of the tabulate stage as text: tables, ``cells.json``, series of the plots. No torch here."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd

from dynat.config.params import Params
from dynat.paper import published
from dynat.paper.cells import NUMBERS, PLOTS, TABLES, cells_json, paper_cells, setting_cells
from dynat.paper.claims import Decision, claim_tables, decisions
from dynat.paper.matrices import SUMMARY, pair_tables
from dynat.paper.measurements import CURVES, RUN, Results, read_results
from dynat.paper.pairs import FIELDS, Compared, compared
from dynat.paper.tables import HERE, Table, columns, markdown, paper_table, setting_tables

NUMBER = [*NUMBERS, "epsilon", "attack_seed", "caveats"]
SETTING = ["method", "checkpoint", "attack", "seed", *NUMBER, "cell"]
PAPER = [
    "target",
    "method",
    "attack",
    "published",
    "doubtful",
    "weights",
    *NUMBER,
    "difference",
    "notes",
    "cell",
]


@dataclass(frozen=True)
class Tabulation:
    """All that the tables, the plots and the report print."""

    params: Params
    results: Results
    cells: pd.DataFrame  # of the settings, then of the paper; see dynat.paper.cells
    compared: Compared
    decisions: list[Decision]  # of the paper's claims, by setting
    tables: dict[str, list[Table]]  # name of the file without suffix -> its tables


def tabulate(params: Params, root: Path = Path()) -> Tabulation:
    """Tabulate the selected results below ``root``; what was not run stays, empty.

    Raises :class:`UserError` on results that contradict their verdicts or each other.
    """
    results = read_results(params, root)
    cells = setting_cells(results.measurements)
    cells = pd.concat([cells, paper_cells(cells, params.published_weights)])
    pairs = compared(results.measurements)
    modern = [setting for setting in params.settings if params.study[setting].train.modern]
    decided = decisions(params.settings, pairs.judged, modern)
    tables = {s: setting_tables(s, params, results, cells, pairs) for s in params.settings}
    tables |= {f"table{number}": [paper_table(number, params, results, cells)] for number in published.TITLES}
    tables |= {"claims": claim_tables(decided), "pairs": pair_tables(params.settings, pairs)}
    return Tabulation(params, results, cells, pairs, decided, tables)


def text_files(found: Tabulation) -> dict[str, str]:
    """File name -> content of the tables, ``cells.json`` and the plots; equal results give equal text."""
    files = {f"{TABLES}/{file}.md": markdown(tables) for file, tables in found.tables.items()}
    for setting in found.params.settings:
        files[f"{TABLES}/{setting}.csv"] = csv_text(setting_rows(setting, found), SETTING)
    paper = published.values().rename(columns={"column": "attack"})
    trained = paper.join(found.cells[[*NUMBER, "difference", "cell"]])  # nothing where nothing was run
    paper = pd.concat([trained.assign(weights=HERE), *_of_published_weights(found, paper)])
    for number, rows in paper.groupby("table"):
        files[f"{TABLES}/table{number}.csv"] = csv_text(rows, PAPER)
    files[f"{TABLES}/pairs.csv"] = csv_text(found.compared.pairs, FIELDS)
    files[f"{TABLES}/cells.json"] = cells_json(found.cells)
    files[f"{PLOTS}/training.csv"] = csv_text(found.results.histories, [*RUN, "epoch", *CURVES])
    ours = found.cells[found.cells["table"].isin(found.params.settings)]
    few = ours[ours["column"].isin(SUMMARY) & (ours["row"] != "")]
    for run, own in few.groupby(few["setting"] + "/" + few["method"], sort=False):
        means = own.set_index("column")["mean"].to_dict()
        numbers = {column: round(means[column], 2) for column in SUMMARY if column in means}
        files[f"{TABLES}/summary/{run}.json"] = json.dumps(numbers, indent=1) + "\n"
    if len(found.results.radii):
        files[f"{PLOTS}/epsilon.csv"] = csv_text(found.results.radii, [*RUN, "epsilon", "accuracy"])
    return files


def _of_published_weights(found: Tabulation, paper: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The published values of a row again, for each checkpoint of its weights."""
    for name, row in found.params.published_weights.items():
        own = paper[paper["row"] == row]
        cells = found.cells[[*NUMBER, "difference", "cell"]].reindex(f"{row}/{name}/" + own["attack"])
        if cells["cell"].notna().any():
            yield own.join(cells.set_axis(own.index)).assign(weights=name)


def setting_rows(setting: str, found: Tabulation) -> pd.DataFrame:
    """A row per method, checkpoint, attack and seed ("mean" after several); no accuracy if not run."""
    ours, names = found.cells[found.cells["table"] == setting], ["method", "checkpoint", "attack"]
    methods = found.params.methods(setting)
    wanted = pd.DataFrame(product(methods, ["best"], columns(found.params.study[setting])), columns=names)
    rows = pd.concat([wanted, ours[names]]).drop_duplicates().merge(ours, how="left")
    return rows.sort_values("method", key=lambda column: column.map(methods.index), kind="stable")


def csv_text(rows: pd.DataFrame, columns: list[str]) -> str:
    """A CSV file with a header, also when there are no rows; what is missing is empty."""
    texts = rows[columns].map(lambda value: "; ".join(value) if isinstance(value, tuple) else value)
    return str(texts.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
