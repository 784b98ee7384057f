"""From the printed text to the verdicts: every number is counted again, every table written again."""

import json
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from dynat.audit.link import Link, absent, broken, good
from dynat.config.params import Params, load
from dynat.errors import UserError
from dynat.evaluation.verdicts import accuracy, decode
from dynat.paper.cells import NUMBERS, average, difference
from dynat.paper.report import recounted  # not render: figures need more than Git has
from dynat.paper.tabulation import REPORT, TABLES, Tabulation, tabulate, text_files
from dynat.runtime.files import read_csv, read_json

CELLS = f"{TABLES}/cells.json"
RETABULATE = "run dvc repro tabulate"
Source = dict[str, Any]


class Printed:
    """The tables as they are printed, and as the verdicts say they should be.

    Raises :class:`UserError` if ``params.yaml`` or ``cells.json`` is missing or broken.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.params: Params = load(root / "params.yaml")
        cells = read_json(root, CELLS)
        if cells is None:
            raise UserError(f"{CELLS}: there are no tables; run dvc repro")
        self.cells: dict[str, dict[str, Any]] = cells
        self._tables: dict[str, Link] = {}

    def sources(self, key: str) -> list[Source]:
        """What the cell says it was counted from."""
        return list(self.cells[key]["sources"])

    def check(self, key: str) -> list[Link]:
        """The cell's text against its verdicts and its metrics, and each table that prints it."""
        try:
            links = [
                self._recount(key),
                self._entry(key),
                *(self._metric(source) for source in self.sources(key)),
            ]
            return [*dict.fromkeys(links), *(self.table(name) for name in self.cells[key]["tables"])]
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, UserError) as error:
            text = " ".join(str(error).split()) if isinstance(error, UserError) else f"unreadable ({error!r})"
            return [broken("printed", f"{CELLS} {key}", text, RETABULATE)]

    def _recount(self, key: str) -> Link:
        cell, counts = self.cells[key], []
        for source in self.sources(key):
            robust = self._robust(source)
            counts.append({"seed": source["seed"], "robust": sum(robust), "n": len(robust)})
        again = average(counts)
        again["numbers"] = {name: again[name] for name in NUMBERS}
        for name in ("text", "rule", "format", "numbers"):
            if cell[name] != again[name]:
                text = f"its {name} is {cell[name]!r}, the verdicts give {again[name]!r}"
                return broken("printed", key, text, RETABULATE)
        if "published" in cell:
            gap = difference(again["accuracy"], cell["published"])
            if gap != cell["difference"]:
                text = f"prints the difference {cell['difference']}, it is {gap}"
                return broken("printed", key, text, RETABULATE)
        shares = " ".join(f"{count['robust']}/{count['n']}" for count in counts)
        return good(
            "printed", key, f"{again['text']} recounted from the verdicts ({shares}, {again['rule']})"
        )

    def _entry(self, key: str) -> Link:
        """The cell's entry in ``cells.json`` against the one that the results give."""
        try:
            again = self.cells_again.get(key)
        except (UserError, ValueError) as error:
            text = f"cannot be checked: {' '.join(str(error).split())}"
            return broken("tables", f"{CELLS} {key}", text, "")
        if again is None:
            return broken("tables", f"{CELLS} {key}", "no selected stage gives this number", RETABULATE)
        if again != self.cells[key]:
            return broken("tables", f"{CELLS} {key}", "is not what tabulate writes", RETABULATE)
        return good("tables", f"{CELLS} {key}", "names the file, key and rule that tabulate would")

    def _robust(self, source: Source) -> list[bool]:
        verdicts = read_json(self.root, source["verdicts"])
        if verdicts is None:
            raise UserError(f"{source['verdicts']}: missing; restore it or run dvc repro")
        evidence = verdicts[source["checkpoint"]][source["attack"]]
        return decode(evidence["robust"], evidence["n"])[: source["n"]]

    def _metric(self, source: Source) -> Link:
        file, pointer = source["file"], source["pointer"]
        metrics = read_json(self.root, file)
        if metrics is None:
            return broken("printed", file, "missing", "restore it or run dvc repro")
        _, kind, setting, *_ = file.split("/")
        spec = getattr(self.params.study[setting], kind, None)
        for name, key in (("epsilon", "epsilon"), ("attack_seed", "seed")):
            wanted = getattr(spec, key, None)
            if wanted is not None and metrics[name] != wanted:
                text = f"{name} is {metrics[name]}, params.yaml says {wanted}"
                return broken("printed", file, text, "run dvc repro")
        _, *path, _ = pointer.split("/")
        stated: Any = reduce(getitem, path, metrics)
        counted = accuracy(self._robust(source))
        if stated != counted:
            text = f"{pointer} says {stated['accuracy']}, its verdicts count {counted['accuracy']}"
            return broken("printed", file, text, "restore both with git checkout, or run dvc repro")
        text = f"{pointer} = {stated['accuracy']}, as {counted['robust']} of {counted['n']} verdicts"
        return good("printed", file, text)

    # ------------------------------------------------------------------------------------------------ tables

    @cached_property
    def again(self) -> tuple[Tabulation, dict[str, str]]:
        """The tabulation of what is there now, and its files but the report."""
        found = tabulate(self.params, self.root)
        return found, text_files(found)

    @cached_property
    def cells_again(self) -> dict[str, dict[str, Any]]:
        """What ``cells.json`` should be."""
        return dict(json.loads(self.again[1][CELLS]))

    def tables(self) -> list[Link]:
        """Every file of tables, plots and report against what the verdicts give."""
        try:
            names = [*self.again[1], REPORT]
        except (UserError, ValueError) as error:
            return [broken("tables", TABLES, " ".join(str(error).split()), "")]
        there = sorted(path for path in (self.root / TABLES).rglob("*") if path.is_file())
        names += [path.relative_to(self.root).as_posix() for path in there]
        return [self.table(name) for name in dict.fromkeys(names)]

    def table(self, name: str) -> Link:
        """One file of the tables against what the verdicts give."""
        if name not in self._tables:
            self._tables[name] = self._table(name)
        return self._tables[name]

    def _table(self, name: str) -> Link:
        try:
            found, files = self.again
            now = (self.root / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return broken("tables", name, "missing", RETABULATE)
        except (OSError, UserError, ValueError) as error:
            return broken("tables", name, f"cannot be checked: {' '.join(str(error).split())}", "")
        if name == REPORT:
            text = "its tables and sheets are"
            if all(part in now for part in recounted(found)):
                return good("tables", name, f"{text} what the verdicts give")
            return broken("tables", name, f"{text} not what the verdicts give", RETABULATE)
        if name not in files:
            return broken("tables", name, "is no file of the tabulation", "remove it, or run dvc repro")
        if now == files[name]:
            return good("tables", name, "is what the verdicts give, to the byte")
        if name.endswith("training.csv") and not self._histories_here():
            remedy = "run dvc repro, or dvc pull from your remote"
            return absent("tables", name, "needs models/*/history.csv", remedy)
        return broken("tables", name, f"{_changed(now, files[name])} not what the verdicts give", RETABULATE)

    def _histories_here(self) -> bool:
        runs = [(*key.split("/")[:3],) for key in self.cells if key.split("/")[0] in self.params.settings]
        needed = {"/".join(run) for run in runs if run[2] != "mean"}
        return all(read_csv(self.root, f"models/{run}/history.csv") for run in needed)


def _changed(now: str, wanted: str) -> str:
    """Where two texts first differ."""
    for number, (one, other) in enumerate(zip(now.splitlines(), wanted.splitlines(), strict=False), 1):
        if one != other:
            return f"line {number} is"
    return "its number of lines is"
