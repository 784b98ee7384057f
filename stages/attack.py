"""Stage attack: clean, FGSM, PGD-k, C&W and APGD-CE accuracy of the best and the last checkpoint.

Writes ``metrics/attack/<setting>/<method>/<seed>.json``, the verdict of every sample beside it, and the
adversarial image of every broken sample; and ``metrics/sanity/...``, checks that this evaluation can be
trusted, and the accuracy against epsilon. A failed check stops nothing: it marks the method in every table.
"""

from functools import partial

from dynat import environment
from dynat.stage import RunRecord, cell, main


def stage() -> int:
    """Attack both checkpoints with everything in the study's ``attack`` section."""
    here = cell(__doc__ or "")
    record = RunRecord("attack", here)
    spec, machine = here.study.attack, here.study.machine
    environment.pin(machine)
    from dynat.assessment import assess
    from dynat.battery import attack

    return assess(record, spec, machine, partial(attack, spec=spec))


if __name__ == "__main__":
    main(stage)
