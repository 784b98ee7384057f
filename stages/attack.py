"""Stage attack: clean, FGSM, PGD-k, C&W and APGD-CE accuracy of the best and the last checkpoint.

Writes ``metrics/attack/<setting>/<method>/<seed>.json``, the verdict of every sample beside it, and the
adversarial image of every broken sample; and ``metrics/sanity/...``, checks that this evaluation can be
trusted, and the accuracy against epsilon. A failed check stops nothing: it marks the method in every table.
"""

from dynat.runtime import machine
from dynat.runtime.record import RunRecord
from dynat.runtime.stage import main, run_of_arguments


def stage() -> int:
    """Attack both checkpoints with everything in the study's ``attack`` section."""
    run = run_of_arguments(__doc__ or "")
    record = RunRecord("attack", run)
    machine.pin(run.study.machine)
    from dynat.evaluation.checkpoints import evaluate_checkpoints
    from dynat.evaluation.evaluate import run_evaluation

    return run_evaluation(run, "attack", run.study.attack, record, evaluate_checkpoints)


if __name__ == "__main__":
    main(stage)
