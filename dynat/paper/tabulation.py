"""Every file of the tabulate stage as text: tables, ``cells.json``, series of the plots. No torch here."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynat.config.params import Params
from dynat.paper import published
from dynat.paper.comparison import paper_cells, paper_table
from dynat.paper.markup import Table, markdown
from dynat.paper.measurements import Results, read_results
from dynat.paper.tables import COLUMNS, Cell, Cells, cells_json, find, radius, setting_cells, setting_tables
from dynat.runtime.files import read_csv

TABLES, PLOTS, REPORT = "metrics/tables", "metrics/plots", "metrics/report.html"
CURVES = ("train_clean", "test_clean", "validation_robust")
NUMBER = ("accuracy", "low", "high", "sd", "n", "epsilon", "attack_seed", "caveats")
SUMMARY = ("clean", "pgd20", "cw", "aa")
SETTING = ("method", "checkpoint", "attack", "seed", *NUMBER, "cell")
PAPER = ("target", "method", "attack", "published", "doubtful", *NUMBER, "difference", "notes", "cell")
Row = Mapping[str, str]
Histories = dict[tuple[str, str], dict[int, list[dict[str, str]]]]  # (setting, method) -> seed -> epochs


@dataclass(frozen=True)
class Tabulation:
    """All that the tables, the plots and the report print."""

    params: Params
    results: Results
    histories: Histories
    cells: Cells
    tables: dict[str, list[Table]]  # name of the file without suffix -> its tables


def tabulate(params: Params, root: Path = Path()) -> Tabulation:
    """Tabulate the selected results below ``root``; what was not run stays, empty.

    Raises :class:`UserError` on results that contradict their verdicts or each other.
    """
    results = read_results(params, root)
    cells = setting_cells(results)
    tables = {setting: setting_tables(setting, params, results, cells) for setting in params.settings}
    cells |= paper_cells(params, cells)
    tables |= {f"table{number}": [paper_table(number, params, results, cells)] for number in published.TITLES}
    for name, each in tables.items():
        keys = dict.fromkeys(entry.key for table in each for row in table.rows for entry in row if entry.key)
        for key in keys:
            cells[key].tables += [f"{TABLES}/{name}.md", REPORT]
    for key, cell in cells.items():
        cell.tables.append(f"{TABLES}/{key.split('/')[0]}.csv")
    histories = {
        (setting, method): {
            seed: read_csv(root, f"models/{setting}/{method}/{seed}/history.csv") for seed in params.seeds
        }
        for setting, method in results
    }
    return Tabulation(params, results, histories, cells, tables)


def text_files(found: Tabulation) -> dict[str, str]:
    """File name -> content of the tables, ``cells.json`` and the plots; equal results give equal text."""
    cells, params = found.cells, found.params
    files = {f"{TABLES}/{name}.md": markdown(tables) for name, tables in found.tables.items()}
    for setting in params.settings:
        files[f"{TABLES}/{setting}.csv"] = csv_text(SETTING, setting_rows(setting, params, cells))
    for number in published.TITLES:
        files[f"{TABLES}/table{number}.csv"] = csv_text(PAPER, paper_rows(number, cells))
    files[f"{TABLES}/cells.json"] = cells_json(cells)
    run = ("setting", "method", "seed")
    files[f"{PLOTS}/training.csv"] = csv_text((*run, "epoch", *CURVES), training_rows(found.histories))
    files[f"{PLOTS}/accuracy.csv"] = csv_text(
        (*run, "attack", "accuracy"), accuracy_rows(params.settings, cells)
    )
    for setting, method in found.results:
        if values := summary(setting, method, params, cells):
            text = json.dumps(values, indent=1) + "\n"
            files[f"{TABLES}/summary/{setting}/{method}.json"] = text
    if curves := list(epsilon_rows(found.results)):
        files[f"{PLOTS}/epsilon.csv"] = csv_text((*run, "epsilon", "accuracy"), curves)
    return files


def summary(setting: str, method: str, params: Params, cells: Cells) -> dict[str, float]:
    """The few accuracies that ``dvc metrics`` and ``dvc exp show`` compare, over the seeds that were run."""
    found = {column: find(cells, setting, method, column, params) for column in SUMMARY}
    return {column: round(each[1].printed.mean, 2) for column, each in found.items() if each}


def setting_rows(setting: str, params: Params, cells: Cells) -> Iterator[Row]:
    """A row per method, checkpoint, attack and seed ("mean" after several); no accuracy if not run."""
    for method in (*params.baselines, *params.variants):
        own = {key: cell for key, cell in cells.items() if key.startswith(f"{setting}/{method}/")}
        columns = [*COLUMNS, *dict.fromkeys(key.split("/")[3] for key in own)]
        for column in dict.fromkeys(columns):
            keys = [f"{setting}/{method}/{seed}/{column}" for seed in (*params.seeds, "mean")]
            for key in [key for key in keys if key in own] or [""]:
                yield {
                    "method": method,
                    "checkpoint": "last" if column.startswith("last-") else "best",
                    "attack": column.removeprefix("last-"),
                    "seed": key.split("/")[2] if key else "",
                    **csv_numbers(own.get(key)),
                    "cell": key,
                }


def paper_rows(number: int, cells: Cells) -> Iterator[Row]:
    """A row per published value, in the paper's order; no accuracy where nothing was run."""
    for row in published.rows():
        for column, value in row.values.items() if row.table == number else ():
            cell = cells.get(key := f"{row.key}/{column}")
            yield {
                "target": row.target,
                "method": row.method,
                "attack": column,
                "published": value.text,
                "doubtful": "yes" if value.doubtful else "",
                **csv_numbers(cell),
                "difference": cell.extra["difference"] if cell else "",
                "notes": "; ".join(note.text for note in value.notes),
                "cell": key if cell else "",
            }


def csv_numbers(cell: Cell | None) -> Row:
    """A number and its circumstances as CSV columns, all empty without a number."""
    if cell is None:
        return dict.fromkeys(NUMBER, "")
    epsilons = dict.fromkeys(radius(m.epsilon) for m in cell.measurements)
    seeds = dict.fromkeys(str(m.attack_seed) for m in cell.measurements)
    caveats = dict.fromkeys(caveat for m in cell.measurements for caveat in m.caveats)
    return {
        **cell.printed.numbers,
        "epsilon": " ".join(epsilons),
        "attack_seed": " ".join(seeds),
        "caveats": "; ".join(caveats),
    }


def training_rows(histories: Histories) -> Iterator[Row]:
    """The histories of all selected trainings, below each other."""
    for (setting, method), by_seed in histories.items():
        for seed, history in by_seed.items():
            for row in history:
                curves = {name: row.get(name, "") for name in ("epoch", *CURVES)}
                yield {"setting": setting, "method": method, "seed": str(seed), **curves}


def accuracy_rows(settings: Sequence[str], cells: Cells) -> Iterator[Row]:
    """Every accuracy of the selected checkpoints."""
    for key, cell in cells.items():
        parts = dict(zip(("setting", "method", "seed", "attack"), key.split("/"), strict=False))
        if parts["setting"] in settings and not parts["attack"].startswith("last-"):
            yield {**parts, "accuracy": cell.printed.numbers["accuracy"]}


def epsilon_rows(results: Results) -> Iterator[Row]:
    """Accuracy against epsilon, from the sanity suite."""
    for (setting, method), by_seed in results.items():
        for seed, result in by_seed.items():
            for epsilon, value in result.epsilon_curve:
                yield {
                    "setting": setting,
                    "method": method,
                    "seed": str(seed),
                    "epsilon": f"{epsilon:.6g}",
                    "accuracy": f"{value:.4g}",
                }


def csv_text(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """A CSV file with a header, also when there are no rows."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
