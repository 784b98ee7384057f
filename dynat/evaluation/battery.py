"""The attacks of an evaluation on both checkpoints of a model, and the checks that they can be trusted."""

from typing import Any

from dynat.config.params import Attack
from dynat.evaluation.assessment import Model, Outcome
from dynat.evaluation.pieces import Pieces
from dynat.evaluation.sanity import SAMPLES, check
from dynat.evaluation.whitebox import Evidence, evaluate
from dynat.runtime import distributed

EVERYTHING = ("fgsm", "pgd", "cw", "apgd-ce")
CHECKPOINTS = (("best", "target", EVERYTHING), ("last", "target.last", ("pgd",)))


def attack(model: Model, pieces: Pieces, spec: Attack) -> Outcome:
    """Attack the selected checkpoint with everything in ``spec`` and the last one with PGD."""
    images, labels = model.images[: spec.n], model.labels[: spec.n]
    found, epochs = {}, {}
    for checkpoint, weights, attacks in CHECKPOINTS:
        network, epochs[f"{checkpoint}_epoch"] = model.network(weights)
        found[checkpoint] = evaluate(network, images, labels, spec, attacks, pieces.within(checkpoint))
    accuracies = {name: 100 * each.robust.float().mean().item() for name, each in found["best"].items()}
    if distributed.rank() > 0:
        return Outcome(found, epochs, accuracies)
    pieces.expect(1)
    sanity = pieces.get(
        f"sanity 0-{min(SAMPLES, len(images))}", lambda: _sanity(model, pieces, spec, found["best"])
    )
    failed = [f"FAILED {name}" for name, each in sanity["checks"].items() if not each["passed"]]
    return Outcome(found, epochs, accuracies, sanity=sanity, notes=tuple(failed))


def _sanity(model: Model, pieces: Pieces, spec: Attack, found: dict[str, Evidence]) -> dict[str, Any]:
    """The content of ``metrics/sanity`` for the selected checkpoint."""
    network, _ = model.network("target")
    guide = model.network("guide")[0] if (model.folder / "guide.safetensors").exists() else None
    for each in (network, guide):
        if each is not None:
            pieces.watch(each)
    images, labels = model.images[: spec.n][:SAMPLES], model.labels[: spec.n][:SAMPLES]
    checks, curve = check(network, guide, images, labels, spec, found)
    return {
        "n": len(images),
        "passed": all(each.passed for each in checks.values()),
        "checks": {name: each.as_json() for name, each in checks.items()},
        "epsilon_curve": curve,
    }
