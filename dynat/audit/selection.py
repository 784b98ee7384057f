"""Which cells a word on the command line means, and the stages behind a cell."""

import difflib
import os
import re
import sys
from typing import Any

from dynat.audit.lineage import Lineage
from dynat.audit.link import Link, broken
from dynat.audit.printed import CELLS, Printed
from dynat.errors import UserError
from dynat.paper.cells import name
from dynat.paper.published import TITLES, values
from dynat.paper.tables import command

NUMBER = r"[-+]?\d+(?:\.\d+)?"


def stages_behind(printed: Printed, lineage: Lineage, key: str) -> tuple[list[str], list[Link]]:
    """The stages behind a cell, the first to run first, and a broken link for each source without one."""
    chain, missing = list[str](), []
    try:
        for file in (source[name] for source in printed.sources(key) for name in ("file", "verdicts")):
            if file in lineage.producers:
                chain += lineage.chain(lineage.producers[file])
            else:
                missing.append(broken("chain", file, "no stage of dvc.yaml writes it", "run dvc repro"))
    except (KeyError, TypeError):
        missing.append(broken("printed", key, "its sources are not as tabulate writes them", "run dvc repro"))
    return [*dict.fromkeys(chain), "tabulate"], missing


def select(printed: Printed, lineage: Lineage, wanted: str) -> list[str]:
    """The cells that are, print or come from ``wanted``; :class:`UserError` if there is none."""
    path = os.path.relpath(wanted) if os.path.isabs(wanted) else os.path.normpath(wanted)
    within = [key for key in printed.cells if f"{key}/".startswith(f"{wanted.rstrip('/')}/")]
    if keys := within or [key for key, cell in printed.cells.items() if _prints(cell, path, wanted)]:
        return keys
    stages = lineage.behind(path)
    keys = [key for key in printed.cells if stages & {*stages_behind(printed, lineage, key)[0]}]
    if not keys:
        raise UserError(f"{wanted}: {_published(printed, wanted) or _near(printed, wanted)}")
    if path.startswith("metrics/tables/"):
        print(f"{path} prints no number of ours; the cells of the stage that wrote it:", file=sys.stderr)
    return keys


def _prints(cell: dict[str, Any], path: str, wanted: str) -> bool:
    numbers = map(float, re.findall(NUMBER, cell.get("text", "")))
    number = re.fullmatch(NUMBER, wanted) is not None and float(wanted) in numbers  # 42 is 42.00
    return number or path in cell.get("tables", ()) or wanted == cell.get("text")


def _published(printed: Printed, wanted: str) -> str | None:
    """What the paper has there, whether or not its row was run."""
    for key, value in values().to_dict("index").items():
        if wanted in (value["row"], key, value["published"]):
            where = f"{TITLES[value['table']].split(':')[0]}, {value['method']}, {name(value['column'])}"
            if key in printed.cells:
                return f"is the paper's own ({where}); ours is {key} = {printed.cells[key]['text']}"
            run = command(values().loc[[key]])
            return f"not reproduced here; the paper has {value['published']} ({where}); {run} runs it"
    return None


def _near(printed: Printed, wanted: str) -> str:
    """A hint at a slip."""
    known = {key.lower(): key for cell in printed.cells for key in (cell, cell.rpartition("/")[0])}
    near = difflib.get_close_matches(wanted.lower(), known, 1, 0.8)
    hint = f"did you mean {known[near[0]]}?" if near else f"{CELLS} has all {len(printed.cells)}"
    return f"no such cell, file or number; {hint}"
