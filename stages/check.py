"""Stage check: params.yaml is sound and fits this machine, before DVC removes any output of a later stage.

Writes the import closure of every stage to ``metrics/code``, on which the stages depend instead of on source
files, and ``data/params.checked``, which is not in Git: a fresh clone runs this stage.
"""

import shlex
from pathlib import Path
from shutil import which

from dynat.config.params import load
from dynat.errors import UserError
from dynat.methods.selection import refuse_setting
from dynat.runtime.closure import as_text, closure_file, closures
from dynat.runtime.files import write_atomically
from dynat.runtime.stage import main


def stage() -> None:
    """Validate params.yaml; DVC stops here if it is wrong."""
    params = load()
    try:
        program = next(iter(shlex.split(params.launch)), "")
    except ValueError as error:
        raise UserError(f"params.yaml: launch: {error} in {params.launch!r}") from None
    if which(program) is None:
        raise UserError(f"params.yaml: launch: {program!r} is not a program on this machine")
    for setting in params.settings:
        refuse_setting(params, setting)
    if params.published_weights:
        from dynat.paper.published import refuse_rows  # pandas takes a while

        refuse_rows(params.published_weights, params.checkpoints)
    for name, closure in closures().items():
        write_atomically(closure_file(name), as_text(closure).encode())
    write_atomically(Path("data/params.checked"), b"params.yaml is sound\n")


if __name__ == "__main__":
    main(stage)
