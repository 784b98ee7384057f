"""Stage check: the whole of params.yaml is sound, before DVC removes any output of a later stage.

Its output never changes, so nothing reruns because of it.
"""

from pathlib import Path

from dynat.checkpoint import write_atomically
from dynat.params import load
from dynat.stage import main


def stage() -> None:
    """Validate params.yaml; DVC stops here if it is wrong."""
    load()
    write_atomically(Path("data/params.checked"), b"params.yaml is sound\n")


if __name__ == "__main__":
    main(stage)
