"""Stage check: the whole of params.yaml is sound, before DVC removes any output of a later stage.

Trainings of days on a CPU are refused here too, before their data is downloaded.

Its output never changes, so nothing reruns because of it.
"""

from pathlib import Path
from shutil import which

from dynat.config.params import load
from dynat.errors import UserError
from dynat.runtime.files import write_atomically
from dynat.runtime.stage import main


def stage() -> None:
    """Validate params.yaml; DVC stops here if it is wrong."""
    params = load()
    program = next(iter(params.launch.split()), "")
    if which(program) is None:
        raise UserError(f"params.yaml: launch: {program!r} is not a program on this machine")
    if any(params.study[setting].machine.device == "auto" for setting in params.settings):
        from dynat.methods.estimate import refuse_selected  # with torch

        refuse_selected(params)
    write_atomically(Path("data/params.checked"), b"params.yaml is sound\n")


if __name__ == "__main__":
    main(stage)
