"""Stage autoattack: AutoAttack standard on the first n test images, resumed piece by piece.

Writes ``metrics/autoattack/<setting>/<method>/<seed>.json`` with the package's own warnings, the verdict of
every sample beside it, and the adversarial image of every broken sample.
"""

from functools import partial

from dynat.runtime import machine as environment
from dynat.runtime.stage import RunRecord, main, run_of_arguments


def stage() -> int:
    """Run the standard ensemble on the selected checkpoint."""
    run = run_of_arguments(__doc__ or "")
    record = RunRecord("autoattack", run)
    spec, machine = run.study.autoattack, run.study.machine
    environment.pin(machine)
    from dynat.evaluation.assessment import assess
    from dynat.evaluation.autoattack import attack

    return assess(record, spec, machine, partial(attack, spec=spec))


if __name__ == "__main__":
    main(stage)
