"""Stage autoattack: AutoAttack standard on the first n test images, resumed piece by piece.

Writes ``metrics/autoattack/<setting>/<method>/<seed>.json`` with the package's own warnings, the verdict of
every sample beside it, and the adversarial image of every broken sample.
"""

from typing import TYPE_CHECKING

from dynat import environment
from dynat.params import AutoAttack
from dynat.stage import RunRecord, cell, main

if TYPE_CHECKING:
    from dynat.assessment import Model, Outcome
    from dynat.pieces import Pieces


def stage() -> int:
    """Run the standard ensemble on the selected checkpoint."""
    here = cell(__doc__ or "")
    record = RunRecord("autoattack", here)
    spec, machine = here.study.autoattack, here.study.machine
    environment.pin(machine)
    from dynat.assessment import assess

    return assess(record, spec, machine, lambda model, pieces: _attack(model, pieces, spec))


def _attack(model: "Model", pieces: "Pieces", spec: AutoAttack) -> "Outcome":
    from dynat.assessment import Outcome
    from dynat.autoattack import STANDARD, run
    from dynat.verdicts import accuracy

    count = min(max(spec.n), len(model.images))
    network, epoch = model.network("target")
    found, warnings = run(network, model.images[:count], model.labels[:count], spec, pieces)
    flags = found[STANDARD[-1]].robust.tolist()
    union = {f"n{n}": accuracy(flags[:n]) for n in spec.n if n <= count}
    precision = "fp32" if spec.precision == "fp32" else "mixed"
    return Outcome(
        {"best": found},
        {"best_epoch": epoch, "precision": precision, "warnings": warnings},
        {name: value["accuracy"] for name, value in union.items()},
        more={"aa": union},
        notes=tuple(warnings),
    )


if __name__ == "__main__":
    main(stage)
