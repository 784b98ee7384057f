"""Stage autoattack: AutoAttack standard on the first n test images, resumed chunk by chunk.

Writes ``metrics/autoattack/<setting>/<method>/<seed>.json`` with the package's own warnings, the verdict of
every sample beside it, and the adversarial image of every broken sample.
"""

from dynat.runtime import machine
from dynat.runtime.record import RunRecord
from dynat.runtime.stage import main, run_of_arguments


def stage() -> int:
    """Run the standard ensemble on the selected checkpoint."""
    run = run_of_arguments(__doc__ or "")
    record = RunRecord("autoattack", run)
    machine.pin(run.study.machine)
    from dynat.evaluation.autoattack import evaluate_selected
    from dynat.evaluation.evaluate import run_evaluation

    return run_evaluation(run, "autoattack", run.study.autoattack, record, evaluate_selected)


if __name__ == "__main__":
    main(stage)
