"""Audit a printed number down to verdicts, weights, data, code and commit.

CELL as digits/dynat/0/aa, table1/DYNAT/aa where that row was run, or digits/dynat for all of its cells;
FILE a table, an output or a code file, such as metrics/attack/digits/dynat/0.json; NUMBER such as 52.41.
Exit status: 0 all links hold, 1 one is broken, 2 there is no such cell.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dynat.audit.checks import add_evidence, audit
from dynat.audit.crate import export
from dynat.audit.lineage import Lineage
from dynat.audit.link import Audited, Link, as_data, sound
from dynat.audit.printed import Printed
from dynat.audit.selection import select
from dynat.errors import UserError
from dynat.runtime.stage import begin


def main(arguments: list[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    options, status = _options(arguments), 1  # the tables' index and the lock are links of every number
    try:
        begin()
        printed, lineage = Printed(Path()), Lineage(Path())
        status, cells = 2, printed.cells
        keys = list(cells) if options.all else select(printed, lineage, options.number)
        found = audit(printed, lineage, keys, whole=options.all)
        add_evidence(printed, found, options.deep, options.replay)
        if options.crate:
            export(Path(), options.crate, {key: cells[key] for key in keys}, found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return status
    if options.json:
        print(json.dumps(as_data(cells, found), indent=1))
    else:
        _print(cells, found)
        if lineage.outputs_missing and len(found) > 1:
            text = "stages whose outputs are not here, so that only the hashes in dvc.lock agree"
            print(f"{text}: {len(lineage.outputs_missing)}")
    return 0 if all(map(sound, found.values())) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dynat.audit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("number", metavar="CELL|FILE|NUMBER", nargs="?")
    add("--all", action="store_true", help="every cell of every table")
    add("--deep", action="store_true", help="also check the adversarial examples and attack again")
    add("--replay", metavar="N", type=int, default=0, help="also repeat the first N training steps")
    add("--json", action="store_true", help="the same as data")
    add("--crate", metavar="DIR", type=Path, help="also export a Workflow Run RO-Crate")
    options = parser.parse_args(arguments)
    if (options.number is None) != options.all:
        parser.error("give a CELL, FILE or NUMBER, or else --all")
    if options.replay < 0:
        parser.error("--replay: N must not be negative")
    return options


def _print(cells: dict[str, Any], found: Audited) -> None:
    """Of one cell a line per link; of several each broken link with its cells; and a summary."""
    concerned: dict[Link, list[str]] = {}
    for key, links in found.items():
        for link in links:
            concerned.setdefault(link, []).append(key)
    holding = [sound(links) for key, links in found.items() if key in cells]
    if len(found) == 1:
        ((key, links),) = found.items()
        cell = cells[key]
        paper = "    paper {published}, difference {difference}" if "published" in cell else ""
        print(f"{key} = {cell.get('text')}{paper.format_map(cell)}")
        for link in links:
            print(link.line)
    else:
        for link, keys in concerned.items():
            if link.state == "broken":
                print(f"{link.line}  [{keys[0] if len(keys) == 1 else f'{len(keys)} cells'}]")
        for key in found if len(found) <= 12 else ():
            print(f"{'✓' if sound(found[key]) else '✗'} {key}  {cells.get(key, {}).get('text', '')}")
        print(f"{len(holding)} cells: {sum(holding)} hold, {len(holding) - sum(holding)} do not")
    faulty, unknown = (sum(link.state == state for link in concerned) for state in ("broken", "absent"))
    print(f"{len(concerned)} links: {faulty} broken, {unknown} could not be checked here")
    if accepted := {link.subject for link in concerned if link.state == "accepted"}:
        print(f"{len(accepted)} stages accepted by proof, not run by this code")


if __name__ == "__main__":
    sys.exit(main())
