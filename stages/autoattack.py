"""Stage autoattack: AutoAttack standard on the first n test images, resumed piece by piece.

Writes ``metrics/autoattack/<setting>/<method>/<seed>.json`` with the package's own warnings, the verdict of
every sample beside it, and the adversarial image of every broken sample.
"""

from functools import partial

from dynat import environment
from dynat.stage import RunRecord, cell, main


def stage() -> int:
    """Run the standard ensemble on the selected checkpoint."""
    here = cell(__doc__ or "")
    record = RunRecord("autoattack", here)
    spec, machine = here.study.autoattack, here.study.machine
    environment.pin(machine)
    from dynat.assessment import assess
    from dynat.autoattack import attack

    return assess(record, spec, machine, partial(attack, spec=spec))


if __name__ == "__main__":
    main(stage)
