"""Audit a printed number down to verdicts, weights, data, code and commit.

CELL as digits/dynat/0/aa, table1/DYNAT/aa where that row was run, or digits/dynat for all of its cells;
FILE a table, an output or a code file, such as metrics/attack/digits/dynat/0.json; NUMBER such as 52.41.
Exit status: 0 all links hold, 1 one is broken, 2 there is no such cell.
"""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynat.audit.link import Link, absent, broken, sound
from dynat.audit.printed import CELLS, Printed, Source
from dynat.errors import UserError
from dynat.paper.cells import name
from dynat.paper.published import TITLES, values
from dynat.paper.tables import command
from dynat.runtime.files import read_json

if TYPE_CHECKING:
    from dynat.audit.lineage import Lineage

SCREEN = 30  # lines
NUMBER = r"[-+]?\d+(?:\.\d+)?"
Audited = dict[str, list[Link]]  # cell -> its links


def main(arguments: list[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    options = _options(arguments)
    try:
        from dynat.audit.lineage import Lineage

        root = Path()
        try:
            shown = Printed(root)
        except UserError as error:  # the tables' index is a link of every number
            print(f"error: {error}", file=sys.stderr)
            return 1
        lineage, fault = None, ""
        try:
            lineage = Lineage(root)
        except UserError as error:
            fault = str(error)
        keys = list(shown.cells) if options.all else select(shown, lineage, options.number)
        if lineage:
            found = audit(shown, lineage, keys, whole=options.all)
        else:
            found = {key: [broken("chain", "dvc.lock and dvc.yaml", fault, "")] for key in keys}
        if options.deep or options.replay:
            add_evidence(shown, found, options.deep, options.replay)
        if options.crate:
            from dynat.audit.crate import export

            export(root, options.crate, {key: shown.cells[key] for key in keys}, found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(shown, found), indent=1, ensure_ascii=False))
    elif len(found) == 1 and not options.all:
        show_one(shown, found)
    else:
        show_many(shown, found)
        if lineage and (count := len(lineage.outputs_missing)):
            print(f"stages whose outputs are not here, so that only the hashes in dvc.lock agree: {count}")
    return 0 if all(sound(links) for links in found.values()) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dynat.audit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("number", metavar="CELL|FILE|NUMBER", nargs="?")
    parser.add_argument("--all", action="store_true", help="every cell of every table")
    parser.add_argument(
        "--deep", action="store_true", help="also check the adversarial examples and attack again"
    )
    parser.add_argument(
        "--replay", metavar="N", type=int, default=0, help="also repeat the first N training steps"
    )
    parser.add_argument("--json", action="store_true", help="the same as data")
    parser.add_argument("--crate", metavar="DIR", type=Path, help="also export a Workflow Run RO-Crate")
    options = parser.parse_args(arguments)
    if (options.number is None) != options.all:
        parser.error("give a CELL, FILE or NUMBER, or else --all")
    if options.replay < 0:
        parser.error("--replay: N must not be negative")
    return options


# ---------------------------------------------------------------------------------------------- which cells


def select(shown: Printed, lineage: "Lineage | None", wanted: str) -> list[str]:
    """The cells that are, print or come from ``wanted``; :class:`UserError` if there is none."""
    if wanted in shown.cells:
        return [wanted]
    if below := [key for key in shown.cells if key.startswith(f"{wanted.rstrip('/')}/")]:
        return below
    path = os.path.relpath(wanted) if os.path.isabs(wanted) else os.path.normpath(wanted)
    keys = [key for key, cell in shown.cells.items() if _prints(cell, path, wanted)]
    if not keys and lineage and (stages := lineage.behind(path)):
        keys = [key for key in shown.cells if stages & {*_stages(shown, lineage, key)[0]}]
        if path.startswith("metrics/tables/"):
            print(f"{path} prints no number of ours; the cells of the stage that wrote it:", file=sys.stderr)
    if not keys:
        raise UserError(_unknown(shown, wanted))
    return keys


def _unknown(shown: Printed, wanted: str) -> str:
    """Why there is no such cell: a row of the paper that was not run, a slip, or neither."""
    for key, value in values().to_dict("index").items():
        if wanted not in (value["row"], key, value["published"]):
            continue
        where = f"{TITLES[value['table']].split(':')[0]}, {value['method']}, {name(value['column'])}"
        if key in shown.cells:
            return f"{wanted}: is the paper's own ({where}); ours is {key} = {shown.cells[key]['text']}"
        paper = f"not reproduced here; the paper has {value['published']} ({where})"
        return f"{wanted}: {paper}; {command(values().loc[[key]])} runs it"
    runs = {key.rpartition("/")[0] for key in shown.cells}
    known = {key.lower(): key for key in (*shown.cells, *runs)}
    near = difflib.get_close_matches(wanted.lower(), known, 1, 0.8)
    hint = f"did you mean {known[near[0]]}?" if near else f"{CELLS} has all {len(shown.cells)}"
    return f"{wanted}: no such cell, file or number; {hint}"


def _prints(cell: dict[str, Any], path: str, wanted: str) -> bool:
    numbers = map(float, re.findall(NUMBER, cell.get("text", "")))
    printed = re.fullmatch(NUMBER, wanted) is not None and float(wanted) in numbers  # 42 is 42.00
    return path in cell.get("tables", ()) or printed or wanted == cell.get("text")


def run_of(source: Source) -> str:
    """``setting/method/seed`` of a source."""
    return "/".join(source["file"].removesuffix(".json").split("/")[2:])


def kind_of(source: Source) -> str:
    """The stage that measured a source, as attack or autoattack."""
    return str(source["file"].split("/")[1])


# ----------------------------------------------------------------------------------------------- the checks


def audit(shown: Printed, lineage: "Lineage", keys: Iterable[str], whole: bool = False) -> Audited:
    """Links 1 to 4 of each cell; ``whole`` adds an entry for the tables and for stages behind no cell."""
    from dynat.audit.circumstances import circumstances
    from dynat.audit.history import commits

    keys = list(keys)
    chains = {key: _stages(shown, lineage, key) for key in keys}
    names = dict.fromkeys(name for chain, _ in chains.values() for name in chain)
    if whole:
        names |= dict.fromkeys(name for name in lineage.stages if lineage.left_something(name))
    history = commits(lineage, names)
    records: dict[tuple[str, str, str], Link] = {}
    found: Audited = {}
    for key in keys:
        chain, missing = chains[key]
        links = [*shown.check(key), *missing]
        links += [link for name in chain for link in lineage.check(name)]
        links += [] if whole else history
        for source in shown.sources(key) if sound(missing) else ():
            for kind in ("train", kind_of(source)):
                at = (kind, run_of(source), _model(shown, source))
                if at not in records:
                    records[at] = circumstances(shown.root, *at)
                links.append(records[at])
        found[key] = list(dict.fromkeys(links))
    if whole:
        found["all tables"] = [
            *shown.tables(),
            *(link for name in names for link in lineage.check(name)),
            *lineage.never_run(names),
            *history,
        ]
    return found


def _model(shown: Printed, source: Source) -> str:
    """SHA-256 of the weights that the metrics are of; empty if they are unreadable or do not say."""
    try:
        return str((read_json(shown.root, source["file"]) or {}).get("model_sha256", ""))
    except UserError:
        return ""


def _stages(shown: Printed, lineage: "Lineage", key: str) -> tuple[list[str], list[Link]]:
    """The stages behind a cell, the first to run first, and a broken link for each source without one."""
    chain: dict[str, None] = {}
    missing = []
    try:
        for source in shown.sources(key):
            for file in (source["file"], source["verdicts"]):
                if file in lineage.producers:
                    chain |= dict.fromkeys(lineage.chain(lineage.producers[file]))
                else:
                    missing.append(broken("chain", file, "no stage of dvc.yaml writes it", "run dvc repro"))
    except (KeyError, TypeError):
        missing.append(broken("printed", key, "its sources are not as tabulate writes them", "run dvc repro"))
    return [*chain, "tabulate"], missing


def add_evidence(shown: Printed, found: Audited, deep: bool, steps: int) -> None:
    """Links 5 and 6, each once."""
    from dynat.audit.evidence import replay, witness

    done: dict[tuple[str, ...], list[Link]] = {}
    for key, links in found.items():
        for source in shown.sources(key) if key in shown.cells and "sources" in shown.cells[key] else ():
            at, run = (source["file"], source["checkpoint"], source["attack"]), (run_of(source),)
            if deep and at not in done:
                done[at] = _attempt(source["file"], partial(witness, shown, source))
            if steps and run not in done:
                done[run] = _attempt(run[0], partial(replay, shown, run[0], steps))
            links += [link for each in (at, run) for link in done.get(each, ()) if link not in links]


def _attempt(subject: str, check: Callable[[], list[Link]]) -> list[Link]:
    try:
        return check()
    except UserError as error:
        return [absent("evidence", subject, str(error))]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        return [broken("evidence", subject, f"does not fit together ({reason})", "run dvc repro")]


# --------------------------------------------------------------------------------------------------- output


def show_one(shown: Printed, found: Audited) -> None:
    """A line per link."""
    ((key, links),) = found.items()
    cell = shown.cells[key]
    paper = f"    paper {cell['published']}, difference {cell['difference']}" if "published" in cell else ""
    print(f"{key} = {cell.get('text')}{paper}")
    for link in links:
        print(link.line)
    count = sum(link.state == "broken" for link in links)
    unknown = sum(link.state == "absent" for link in links)
    checked = len(links) - unknown
    print(
        (f"{count} of {checked} links broken" if count else f"all {checked} links hold")
        + (f", {unknown} could not be checked here" if unknown else "")
    )


def show_many(shown: Printed, found: Audited) -> None:
    """Each broken link once with the cells that it concerns, and a summary."""
    cells: dict[Link, list[str]] = {}
    for key, links in found.items():
        for link in links:
            cells.setdefault(link, []).append(key)
    faulty = {link: keys for link, keys in cells.items() if link.state == "broken"}
    for link, keys in list(faulty.items())[:SCREEN]:
        print(f"{link.line}  [{keys[0] if len(keys) == 1 else f'{len(keys)} cells'}]")
    if len(faulty) > SCREEN:
        print(f"✗ and {len(faulty) - SCREEN} more; --json lists them")
    if len(found) <= 12:
        for key, links in found.items():
            text = shown.cells.get(key, {}).get("text", "")
            print(f"{'✓' if sound(links) else '✗'} {key}  {text}")
    bad = sum(not sound(links) for key, links in found.items() if key in shown.cells)
    total = sum(key in shown.cells for key in found)
    unknown = sum(link.state == "absent" for link in cells)
    print(f"{total} cells: {total - bad} hold, {bad} do not")
    print(f"{len(cells)} links: {len(faulty)} broken, {unknown} could not be checked here")


def as_json(shown: Printed, found: Audited) -> list[dict[str, Any]]:
    """The audit as data."""
    return [
        {
            "cell": key,
            "text": shown.cells.get(key, {}).get("text"),
            "ok": sound(links),
            "links": [asdict(link) for link in links],
        }
        for key, links in found.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
