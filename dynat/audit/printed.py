"""From the printed text to the verdicts: every number is counted again, every table written again."""

import json
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from dynat.audit.link import Link, absent, broken, good, one_line
from dynat.config.attack import Attack, AutoAttack
from dynat.config.params import Params, load
from dynat.errors import UserError
from dynat.evaluation.verdicts import accuracy, decode
from dynat.paper.cells import PLOTS, REPORT, TABLES, average, difference
from dynat.paper.measurements import RUN
from dynat.paper.report import recounted  # not render: figures need more than Git has
from dynat.paper.tabulation import tabulate, text_files
from dynat.runtime.files import read_json

CELLS = f"{TABLES}/cells.json"
TRAINING = f"{PLOTS}/training.csv"
RETABULATE = "run dvc repro tabulate"
Source = dict[str, Any]


def epsilon_of(spec: Attack | AutoAttack, source: Source) -> float | None:
    """The radius of a source by params.yaml; None for a further one of AutoAttack that it does not name."""
    _, at, key = source["attack"].partition(" at ")
    if not isinstance(spec, AutoAttack):
        return spec.epsilon
    run = spec.by_radius.get(at + key)
    return run.epsilon if run else None


def kind_and_run(source: Source) -> tuple[str, str]:
    """The stage that measured a source, as attack or autoattack, and its ``setting/method/seed``."""
    _, kind, run = source["file"].removesuffix(".json").split("/", 2)
    return kind, run


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
        self._entries = {f"{CELLS} {key}": cell for key, cell in cells.items()}

    def sources(self, key: str) -> list[Source]:
        """What the cell says it was counted from."""
        return list(self.cells[key]["sources"])

    def behind(self, run: str) -> list[tuple[str, str]]:
        """Stages and runs, ``setting/method/seed``, that weights of ``run`` come from, the last its own."""
        setting, method, seed = run.split("/")
        guide, checkpoint = self.params.guide_run(method, int(seed)), self.params.checkpoint
        runs = [*([guide] if guide else []), (method, int(seed))]
        return [("import" if name in checkpoint else "train", f"{setting}/{name}/{of}") for name, of in runs]

    def check(self, key: str) -> list[Link]:
        """The cell's text against its verdicts and its metrics, and each table that prints it."""
        try:
            links = [self._recount(key), *map(self._metric, self.sources(key))]
            names = [f"{CELLS} {key}", *self.cells[key]["tables"]]
            links += [self._compared[TABLES if TABLES in self._compared else name] for name in names]
            return list(dict.fromkeys(links))
        except UserError as error:
            return [broken("printed", f"{CELLS} {key}", str(error), RETABULATE)]
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            return [broken("printed", f"{CELLS} {key}", f"unreadable ({error!r})", RETABULATE)]

    def _recount(self, key: str) -> Link:
        cell = self.cells[key]
        robust = [(source["seed"], self._robust(source)) for source in self.sources(key)]
        counts = [{"seed": seed, "robust": sum(each), "n": len(each)} for seed, each in robust]
        again = average(counts)
        del again["mean"]
        if "published" in cell:
            again["difference"] = difference(again["numbers"]["accuracy"], cell["published"])
        for name, value in again.items():
            if cell[name] != value:
                text = f"its {name} is {cell[name]!r}, the verdicts give {value!r}"
                return broken("printed", key, text, RETABULATE)
        shares = " ".join(f"{count['robust']}/{count['n']}" for count in counts)
        text = f"{again['text']} recounted from the verdicts ({shares}, {again['rule']})"
        return good("printed", key, text)

    def _robust(self, source: Source) -> list[bool]:
        verdicts = read_json(self.root, source["verdicts"])
        if verdicts is None:
            raise UserError(f"{source['verdicts']}: missing; restore it or run dvc repro")
        evidence = verdicts[source["checkpoint"]][source["attack"]]
        return decode(evidence["robust"], evidence["n"])[: source["n"]]

    def _metric(self, source: Source) -> Link:
        """The metrics of a source against ``params.yaml`` and the verdicts."""
        file, pointer = source["file"], source["pointer"]
        metrics = read_json(self.root, file)
        if metrics is None:
            return broken("printed", file, "missing", "restore it or run dvc repro")
        kind, run = kind_and_run(source)
        spec = getattr(self.params.study[run.split("/")[0]], kind)
        if epsilon_of(spec, source) is None:
            text = f"{pointer} is of a radius that params.yaml does not ask for"
            return broken("printed", file, text, "run dvc repro")
        stated: Any = reduce(getitem, pointer.split("/")[1:-1], metrics)
        counted = accuracy(self._robust(source))
        for text, now, wanted in (
            (f"epsilon is {metrics['epsilon']}, params.yaml says", metrics["epsilon"], spec.epsilon),
            (f"attack_seed is {metrics['attack_seed']}, params.yaml says", metrics["attack_seed"], spec.seed),
            (f"{pointer} says {stated['accuracy']}, its verdicts count", stated, counted),
        ):
            if now != wanted:
                value = wanted["accuracy"] if wanted is counted else wanted
                advice = "restore both with git checkout, or run dvc repro"
                return broken("printed", file, f"{text} {value}", advice)
        text = f"{pointer} = {stated['accuracy']}, as {counted['robust']} of {counted['n']} verdicts"
        return good("printed", file, text)

    def tables(self) -> list[Link]:
        """Every file of tables, plots and report against what the verdicts give."""
        return [link for name, link in self._compared.items() if not name.startswith(f"{CELLS} ")]

    @cached_property
    def _compared(self) -> dict[str, Link]:
        """Each of these files, and each entry of ``cells.json``; ``TABLES`` alone if there is no telling."""
        try:
            found = tabulate(self.params, self.root)
            wanted: dict[str, Any] = {**text_files(found), REPORT: recounted(found)}
        except (UserError, ValueError) as error:
            return {TABLES: broken("tables", TABLES, f"cannot be checked: {one_line(error, 500)}", "")}
        wanted |= {f"{CELLS} {key}": cell for key, cell in json.loads(wanted[CELLS]).items()}
        files = [path for path in sorted((self.root / TABLES).rglob("*")) if path.is_file()]
        there = [*(path.relative_to(self.root).as_posix() for path in files), *self._entries]
        links = {name: self._compare(name, wanted.get(name)) for name in (*wanted, *there)}
        results = found.results
        ran, trained = ({*map(tuple, each[RUN].values)} for each in (results.measurements, results.histories))
        if ran - trained:
            remedy = "run dvc repro, or dvc pull from your remote"
            links[TRAINING] = absent("tables", TRAINING, "needs models/*/history.csv", remedy)
        return links

    def _compare(self, name: str, wanted: Any) -> Link:
        try:
            now: Any = self._entries.get(name) or (self.root / name).read_text("utf-8", "replace")
        except OSError as error:
            text = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error.strerror})"
            return broken("tables", name, text, RETABULATE)
        if wanted is None:
            return broken("tables", name, "is nothing that tabulate writes", "remove it, or run dvc repro")
        what = "its tables and sheets are" if name == REPORT else "is"
        if all(part in now for part in wanted) if name == REPORT else now == wanted:
            return good("tables", name, f"{what} what the verdicts give")
        return broken("tables", name, f"{what} not what the verdicts give", RETABULATE)
