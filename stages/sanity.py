"""Stage sanity: checks that the evaluation of a model can be trusted, and its accuracy against epsilon.

Writes ``metrics/sanity/<setting>/<method>/<seed>.json``. A failed check does not stop the pipeline: it marks
the method in every table.
"""

from pathlib import Path

from dynat import environment
from dynat.checkpoint import sha256, write_json
from dynat.stage import RunRecord, cell, main
from dynat.tracking import Tracker

SAMPLES = 200  # enough for comparisons to within a point; the accuracies themselves come from the attacks


def stage() -> None:
    """Run all checks on the selected checkpoint."""
    here = cell(__doc__ or "")
    record = RunRecord("sanity", here)
    spec = here.study.attack
    environment.pin(here.study.machine)

    tracker = Tracker(
        here.setting, f"{here.method}-{here.seed}", tags={"stage": "sanity"}, params=spec.model_dump()
    )

    from dynat.data import load
    from dynat.results import load_network
    from dynat.sanity import check

    with tracker:
        device = environment.device_of(here.study.machine)
        data = load(Path("data", f"{here.setting}.safetensors"), device)
        count = min(SAMPLES, spec.n or SAMPLES, len(data.test_images))
        folder = here.path("models")
        network, epoch = load_network(folder / "target.safetensors", device)
        weights = folder / "guide.safetensors"
        guide = load_network(weights, device)[0] if weights.exists() else None
        checks, curve = check(network, guide, data.test_images[:count], data.test_labels[:count], spec)
        model = sha256(folder / "target.safetensors")
        found = {
            "epsilon": spec.epsilon,
            "attack_seed": spec.seed,
            "n": count,
            "model_sha256": model,
            "best_epoch": epoch,
            "passed": all(each.passed for each in checks.values()),
            "checks": {name: each.as_json() for name, each in checks.items()},
            "epsilon_curve": curve,
        }
        write_json(here.path("metrics/sanity", ".json"), found)
        for name, each in checks.items():
            print("passed" if each.passed else "FAILED", name, each.values)
        tracker.metrics(0, {"failed_checks": sum(not each.passed for each in checks.values())})
        tracker.tags({"model.sha256": model})
        record.write(**environment.record(device), model_sha256=model, mlflow_run_id=tracker.finish())


if __name__ == "__main__":
    main(stage)
