"""Stage attack: clean, FGSM, PGD-k, C&W and APGD-CE accuracy of the best and the last checkpoint.

Writes ``metrics/attack/<setting>/<method>/<seed>.json``, the verdict of every sample beside it, and the
adversarial image of every broken sample; and ``metrics/sanity/...``, checks that this evaluation can be
trusted, and the accuracy against epsilon. A failed check stops nothing: it marks the method in every table.
"""

from typing import TYPE_CHECKING, Any

from dynat import environment, parallel
from dynat.params import Attack
from dynat.stage import RunRecord, cell, main

if TYPE_CHECKING:
    from dynat.assessment import Model, Outcome
    from dynat.pieces import Pieces

EVERYTHING = ("fgsm", "pgd", "cw", "apgd-ce")
CHECKPOINTS = (("best", "target", EVERYTHING), ("last", "target.last", ("pgd",)))


def stage() -> int:
    """Attack both checkpoints with everything in the study's ``attack`` section."""
    here = cell(__doc__ or "")
    record = RunRecord("attack", here)
    spec, machine = here.study.attack, here.study.machine
    environment.pin(machine)
    from dynat.assessment import assess

    return assess(record, spec, machine, lambda model, pieces: _attack(model, pieces, spec))


def _attack(model: "Model", pieces: "Pieces", spec: Attack) -> "Outcome":
    from dynat.assessment import Outcome
    from dynat.evaluation import evaluate

    images, labels = model.images[: spec.n], model.labels[: spec.n]
    found, epochs = {}, {}
    for checkpoint, weights, attacks in CHECKPOINTS:
        network, epochs[f"{checkpoint}_epoch"] = model.network(weights)
        found[checkpoint] = evaluate(network, images, labels, spec, attacks, pieces.within(checkpoint))
    accuracies = {name: 100 * each.robust.float().mean().item() for name, each in found["best"].items()}
    if parallel.rank() > 0:
        return Outcome(found, epochs, accuracies)
    sanity = _sanity(model, pieces, spec, found["best"])
    failed = [
        f"FAILED {name} {check['values']}" for name, check in sanity["checks"].items() if not check["passed"]
    ]
    accuracies["failed_checks"] = len(failed)
    return Outcome(found, epochs, accuracies, sanity=sanity, notes=tuple(failed))


def _sanity(model: "Model", pieces: "Pieces", spec: Attack, found: dict[str, Any]) -> dict[str, Any]:
    """The content of ``metrics/sanity`` for the selected checkpoint."""
    from dynat.sanity import SAMPLES, check

    network, _ = model.network("target")
    pieces.watch(network)
    guide = model.network("guide")[0] if (model.folder / "guide.safetensors").exists() else None
    images, labels = model.images[: spec.n][:SAMPLES], model.labels[: spec.n][:SAMPLES]
    checks, curve = check(network, guide, images, labels, spec, found)
    return {
        "n": len(images),
        "passed": all(each.passed for each in checks.values()),
        "checks": {name: each.as_json() for name, each in checks.items()},
        "epsilon_curve": curve,
    }


if __name__ == "__main__":
    main(stage)
