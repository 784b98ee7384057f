"""Stage attack: clean, FGSM, PGD-k, C&W and APGD-CE accuracy of the best and the last checkpoint.

Writes ``metrics/attack/<setting>/<method>/<seed>.json``, the verdict of every sample beside it, and the
adversarial image of every broken sample; and ``metrics/sanity/...``, checks that this evaluation can be
trusted, and the accuracy against epsilon. A failed check stops nothing: it marks the method in every table.
"""

from functools import partial

from dynat.runtime import machine as environment
from dynat.runtime.stage import RunRecord, main, run_of_arguments


def stage() -> int:
    """Attack both checkpoints with everything in the study's ``attack`` section."""
    run = run_of_arguments(__doc__ or "")
    record = RunRecord("attack", run)
    spec, machine = run.study.attack, run.study.machine
    environment.pin(machine)
    from dynat.evaluation.assessment import assess
    from dynat.evaluation.battery import attack

    return assess(record, spec, machine, partial(attack, spec=spec))


if __name__ == "__main__":
    main(stage)
