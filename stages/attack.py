"""Stage attack: clean, FGSM, PGD-k, C&W and APGD-CE accuracy of the best and the last checkpoint.

Writes ``metrics/attack/<setting>/<method>/<seed>.json``, the verdict of every sample beside it, and the
adversarial image of every broken sample.
"""

import sys
from pathlib import Path

from tqdm import tqdm

from dynat import environment
from dynat.checkpoint import sha256
from dynat.stage import RunRecord, cell, main
from dynat.tracking import Tracker

EVERYTHING = ("fgsm", "pgd", "cw", "apgd-ce")
CHECKPOINTS = (("best", "target.safetensors", EVERYTHING), ("last", "target.last.safetensors", ("pgd",)))


def stage() -> None:
    """Attack both checkpoints with everything in the study's ``attack`` section."""
    here = cell(__doc__ or "")
    record = RunRecord("attack", here)
    spec = here.study.attack
    environment.pin(here.study.machine)
    tracker = Tracker(
        here.setting, f"{here.method}-{here.seed}", tags={"stage": "attack"}, params=spec.model_dump()
    )

    from dynat.data import load
    from dynat.evaluation import evaluate
    from dynat.results import load_network, write_results

    with tracker:
        device = environment.device_of(here.study.machine)
        data = load(Path("data", f"{here.setting}.safetensors"), device)
        images, labels = data.test_images[: spec.n], data.test_labels[: spec.n]
        found, epochs = {}, {}
        with tqdm(total=2 * len(images), leave=False, disable=not sys.stderr.isatty()) as bar:
            for checkpoint, file, attacks in CHECKPOINTS:
                network, epochs[f"{checkpoint}_epoch"] = load_network(here.path("models") / file, device)
                bar.set_description(f"{here.setting} {here.method} {checkpoint}")
                found[checkpoint] = evaluate(network, images, labels, spec, attacks, bar.update)
        model = sha256(here.path("models") / "target.safetensors")
        header = {"epsilon": spec.epsilon, "attack_seed": spec.seed, "model_sha256": model, **epochs}
        write_results(here.path("metrics/attack"), header, found, {})
        accuracies = {name: 100 * e.robust.float().mean().item() for name, e in found["best"].items()}
        print("  ".join(f"{name} {value:.2f}" for name, value in accuracies.items()))
        tracker.metrics(0, accuracies)
        tracker.tags({"model.sha256": model})
        record.write(**environment.record(device), model_sha256=model, mlflow_run_id=tracker.finish())


if __name__ == "__main__":
    main(stage)
