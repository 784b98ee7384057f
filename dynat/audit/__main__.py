"""Audit a printed number down to verdicts, weights, data, code and commit.

CELL as digits/dynat/0/aa, table1/DYNAT/aa where that row was run, or digits/dynat for all of its cells;
FILE a table, an output or a code file, such as metrics/attack/digits/dynat/0.json; NUMBER such as 52.41.
Exit status: 0 all links hold, 1 one is broken, 2 there is no such cell.
"""

import argparse
import json
import sys
from pathlib import Path

from dynat.audit.checks import add_evidence, audit
from dynat.audit.crate import export
from dynat.audit.lineage import Lineage
from dynat.audit.link import sound
from dynat.audit.output import as_json, print_cell, print_many, print_stages
from dynat.audit.printed import Printed
from dynat.audit.selection import select
from dynat.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    options = _options(arguments)
    try:
        printed, lineage = Printed(Path()), Lineage(Path())
    except UserError as error:  # the tables' index and the lock are links of every number
        return _fail(error, 1)
    cells = printed.cells
    try:
        keys = list(cells) if options.all else select(printed, lineage, options.number)
        found = audit(printed, lineage, keys, whole=options.all)
        add_evidence(printed, found, options.deep, options.replay)
        if options.crate:
            export(Path(), options.crate, {key: cells[key] for key in keys}, found)
    except UserError as error:
        return _fail(error, 2)
    if options.json:
        print(json.dumps(as_json(cells, found), indent=1, ensure_ascii=False))
    elif len(found) == 1 and not options.all:
        print_cell(cells, keys[0], found[keys[0]])
    else:
        print_many(cells, found)
        print_stages(found, lineage.outputs_missing)
    return 0 if all(sound(links) for links in found.values()) else 1


def _fail(error: UserError, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


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


if __name__ == "__main__":
    sys.exit(main())
