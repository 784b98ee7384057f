"""Stage tabulate: results -> ``metrics/tables``, ``metrics/plots`` and ``metrics/report.html``.

Every number is recounted from the verdicts; results that contradict each other are refused.
"""

from pathlib import Path

from dynat.config.params import load
from dynat.paper.cells import REPORT
from dynat.paper.report import render
from dynat.paper.tabulation import tabulate, text_files
from dynat.runtime.files import write_atomically
from dynat.runtime.stage import main


def stage() -> None:
    """Write every table, the sources of its numbers and the series of the plots."""
    params = load()
    found = tabulate(params)
    files = text_files(found) | {REPORT: render(found)}
    for name, text in files.items():
        write_atomically(Path(name), text.encode())
    for setting in params.settings:
        print(files[f"metrics/tables/{setting}.md"])


if __name__ == "__main__":
    main(stage)
