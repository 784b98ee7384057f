"""Stage train: a recipe and a seed -> ``models/<setting>/<method>/<seed>/``.

``target.safetensors`` and ``guide.safetensors`` are the weights of the epoch with the best held-out robust
accuracy, ``*.last.safetensors`` those of the last epoch; ``history.csv`` has a row per epoch, ``trace.csv``
the losses of the first steps.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dynat import environment, parallel
from dynat.checkpoint import ResumeStore, graceful_stop, resume_key, save_weights, sha256, write_csv
from dynat.errors import DivergedError, UserError
from dynat.params import Network
from dynat.recipes import Recipe
from dynat.stage import INTERRUPTED, Cell, RunRecord, cell, code_key, main
from dynat.tracking import Tracker

if TYPE_CHECKING:
    from torch import nn

    from dynat.training import Training


def stage() -> int:
    """Train, resume where a stopped run left off, write the model folder at once."""
    here = cell(__doc__ or "")
    record = RunRecord("train", here)
    environment.pin(here.study.machine)
    if parallel.rank() > 0:
        return _train_along(here)
    tracker = Tracker(
        here.setting,
        f"{here.method}-{here.seed}",
        tags={"stage": "train"},
        params={**here.params.recipe(here.setting, here.method).model_dump(), "seed": here.seed},
    )
    from dynat.estimate import refuse_days_on_cpu

    training, metadata, key = set_up(here)
    engine, images = training.engine, training.data.train_images
    channels, height, width = images.shape[1:]
    refuse_days_on_cpu(here.setting, here.study.machine, engine, (channels, height, width), len(images))
    with ResumeStore(key) as store, tracker:
        tracker.begin(store.token)
        if state := parallel.from_first(store.load()):
            training.restore(state["training"])
            record.values["resumed_from_epoch"] = training.progress.epoch
            print(f"resumed after epoch {training.progress.epoch - 1}")

        def after_epoch(row: dict[str, float]) -> None:
            store.save({"training": training.state()})
            tracker.metrics(int(row["epoch"]), {k: v for k, v in row.items() if k != "epoch"})
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

        def watch(batches: Iterator[Any], count: int) -> Iterator[Any]:
            label = f"{here.setting} {here.method} epoch {training.progress.epoch + 1}"
            yield from tqdm(batches, label, count, leave=False, disable=not sys.stderr.isatty())

        with graceful_stop() as stop:
            try:
                done = training.run(after_epoch, lambda: parallel.anyone(stop.requested), watch)
            except DivergedError as error:
                raise UserError(f"{error}; {store.last_good}") from None
        parallel.leave()
        if not done:
            tracker.finish("KILLED", timeout=0)
            print(f"stopped; epoch {training.progress.epoch} starts again at the next run", file=sys.stderr)
            return INTERRUPTED
        _write(here.path("models"), training, metadata)
        model = sha256(here.path("models") / "target.safetensors")
        tracker.tags({"model.sha256": model})
        run_id = tracker.finish()
        record.write(
            **environment.record(training.engine.device),
            precision=training.precision,
            processes=parallel.size(),
            resumed=store.resumed,
            model_sha256=model,
            mlflow_run_id=run_id,
        )
        store.clear()  # the very last: until then a kill costs no epoch
    return 0


def _train_along(here: Cell) -> int:
    """What every process but the first does: its share of each batch, and no output."""
    training, _, _ = set_up(here)
    with graceful_stop() as stop:
        if state := parallel.from_first(None):
            training.restore(state["training"])
        done = training.run(lambda _: None, lambda: parallel.anyone(stop.requested))
    parallel.leave()
    return 0 if done else INTERRUPTED


def set_up(here: Cell) -> tuple["Training", dict[str, str], str]:
    """The training before its first step, the metadata of its weights and its resume key.

    Needs ``data/<setting>.safetensors``; :class:`UserError` if it is missing.
    """
    import torch

    from dynat.data import load
    from dynat.step import Engine
    from dynat.training import Training

    study, recipe = here.study, here.params.recipe(here.setting, here.method)
    device = environment.device_of(study.machine)
    compiled = study.train.compile and recipe.inner.mode == "eval" and recipe.inner.steps > 0
    compiler = environment.compiler(f"study.{here.setting}.train.compile", device) if compiled else "none"
    parallel.join(device)
    source = Path("data", f"{here.setting}.safetensors")
    data = load(source, device)
    torch.manual_seed(here.seed)
    networks, metadata = {}, {}
    for name, spec in {"target": study.target, "guide": study.guide if recipe.needs_guide else None}.items():
        if spec is not None:
            networks[name], metadata[name] = _network(here, recipe, spec, data.train_images.shape[1])
            networks[name].to(device).to(memory_format=torch.channels_last)
    precision = environment.precision_of(study.train, device)
    key = resume_key(
        {
            "recipe": recipe.model_dump_json(),
            "train": study.train.model_dump_json(),
            "networks": json.dumps(metadata),
            "seed": str(here.seed),
            "data": sha256(source),
            "code": code_key(),
            "processes": str(parallel.size()),
            "compiler": compiler,
            "precision": str(precision),
            **environment.fingerprint(device),
        }
    )
    fold = study.machine.instructions is None  # where bits are pinned, the plain arithmetic
    engine = Engine(recipe, networks["target"], networks.get("guide"), precision, fold, compiled)
    return Training(engine, study.train, data, here.seed), metadata, key


def _network(here: Cell, recipe: Recipe, spec: Network, channels: int) -> tuple["nn.Module", str]:
    """A network of the study and the metadata that builds it again."""
    from dynat.networks import build

    options: dict[str, Any] = {"name": spec.name, "num_classes": here.study.data.classes}
    options |= {"in_channels": channels, **spec.options}
    if recipe.normalise and here.study.train.mean is not None:
        options |= {"mean": here.study.train.mean, "std": here.study.train.std}
    return build(**options), json.dumps(options, sort_keys=True)


def _write(folder: Path, training: "Training", metadata: dict[str, str]) -> None:
    """Write the model folder under a temporary name and rename it: it is there whole or not at all."""
    progress = training.progress
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, network in training.networks.items():
        last = {key: value.detach().cpu() for key, value in network.state_dict().items()}
        for suffix, weights, epoch in (
            ("", progress.best[name], progress.best_epoch),
            (".last", last, progress.epoch - 1),
        ):
            save_weights(
                partial / f"{name}{suffix}.safetensors",
                weights,
                {"network": metadata[name], "epoch": str(epoch), "precision": training.precision},
            )
    write_csv(partial / "history.csv", progress.history)
    write_csv(partial / "trace.csv", progress.trace)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main(stage)
