"""Stage autoattack: AutoAttack standard on the first n test images, resumed piece by piece.

Writes ``metrics/autoattack/<setting>/<method>/<seed>.json`` with the package's own warnings, the verdict of
every sample beside it, and the adversarial image of every broken sample.
"""

import sys
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from dynat import environment
from dynat.checkpoint import ResumeStore, graceful_stop, resume_key, sha256
from dynat.stage import INTERRUPTED, RunRecord, cell, code_key, main
from dynat.tracking import Tracker


def stage() -> int:
    """Run the standard ensemble on the selected checkpoint."""
    here = cell(__doc__ or "")
    record = RunRecord("autoattack", here)
    spec = here.study.autoattack
    environment.pin(here.study.machine)
    tracker = Tracker(
        here.setting, f"{here.method}-{here.seed}", tags={"stage": "autoattack"}, params=spec.model_dump()
    )

    from dynat.autoattack import STANDARD, run
    from dynat.data import load
    from dynat.results import load_network, write_results
    from dynat.verdicts import accuracy

    device = environment.device_of(here.study.machine)
    source, weights = Path("data", f"{here.setting}.safetensors"), here.path("models") / "target.safetensors"
    data = load(source, device)
    count = min(max(spec.n), len(data.test_images))
    network, epoch = load_network(weights, device)
    model = sha256(weights)
    key = resume_key(
        {
            "autoattack": spec.model_dump_json(
                exclude={"n", "workers"}
            ),  # more samples keep the finished chunks
            "data": sha256(source),
            "model": model,
            "code": code_key(),
            "package": version("pyautoattack"),
            **environment.fingerprint(device),
        }
    )
    label = f"{here.setting} {here.method} AutoAttack"
    chunks = -(-count // spec.batch)
    with (
        ResumeStore(key) as store,
        tracker,
        tqdm(desc=label, total=len(STANDARD) * chunks, leave=False, disable=not sys.stderr.isatty()) as bar,
    ):
        tracker.begin(store.token)

        def notify(what: str) -> None:
            bar.update()
            bar.set_postfix_str(what)
            if not sys.stderr.isatty():
                print(f"{label}: {what}", flush=True)

        with graceful_stop() as stop:
            outcome = run(
                network,
                data.test_images[:count],
                data.test_labels[:count],
                spec,
                load=store.load_piece,
                save=store.save_piece,
                notify=notify,
                stopped=lambda: stop.requested,
            )
        if outcome is None:
            tracker.finish("KILLED", timeout=0)
            print("stopped; the finished pieces are kept for the next run", file=sys.stderr)
            return INTERRUPTED
        found, warnings = outcome
        flags = found[STANDARD[-1]].robust.tolist()
        union = {f"n{n}": accuracy(flags[:n]) for n in spec.n if n <= count}
        header = {
            "epsilon": spec.epsilon,
            "attack_seed": spec.seed,
            "precision": "fp32" if spec.precision == "fp32" else "mixed",
            "model_sha256": model,
            "best_epoch": epoch,
            "warnings": warnings,
        }
        write_results(here.path("metrics/autoattack"), header, {"best": found}, {"aa": union})
        tracker.metrics(0, {name: value["accuracy"] for name, value in union.items()})
        tracker.tags({"model.sha256": model})
        record.write(**environment.record(device), model_sha256=model, mlflow_run_id=tracker.finish())
        store.clear()  # the very last: until then a kill costs no piece
    print("  ".join(f"{name} {value['accuracy']:.2f}" for name, value in union.items()), *warnings, sep="\n")
    return 0


if __name__ == "__main__":
    main(stage)
