"""A training before its first step: data, networks, engine and the key of its resume state."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynat.config.params import Network
from dynat.config.recipe import Recipe
from dynat.data.splits import load
from dynat.methods.step import Engine
from dynat.methods.training import Training
from dynat.networks.architectures import build
from dynat.runtime import distributed, machine
from dynat.runtime.closure import code_key
from dynat.runtime.files import digest, sha256
from dynat.runtime.stage import Run


def set_up(run: Run) -> tuple[Training, dict[str, str], str]:
    """The training before its first step, the metadata of its weights and its resume key.

    Needs ``data/<setting>.safetensors``; :class:`UserError` if it is missing.
    """
    study, recipe = run.study, run.params.recipe(run.setting, run.method)
    device = machine.device_of(study.machine)
    compiled = study.train.compile and recipe.inner.mode == "eval" and recipe.inner.steps > 0
    compiler = machine.compiler(f"study.{run.setting}.train.compile", device) if compiled else "none"
    distributed.join(device)
    source = Path("data", f"{run.setting}.safetensors")
    data = load(source, device)
    torch.manual_seed(run.seed)
    networks, metadata = {}, {}
    for name, spec in {"target": study.target, "guide": study.guide if recipe.needs_guide else None}.items():
        if spec is not None:
            networks[name], metadata[name] = _network(run, recipe, spec, data.train_images.shape[1])
            networks[name].to(device).to(memory_format=torch.channels_last)
    precision = machine.precision_of(study.train.precision, device)
    key = digest(
        {
            "recipe": recipe.model_dump_json(),
            "train": study.train.model_dump_json(),
            "networks": json.dumps(metadata),
            "seed": str(run.seed),
            "data": sha256(source),
            "code": code_key("train"),
            "processes": str(distributed.size()),
            "compiler": compiler,
            "precision": str(precision),
            **machine.fingerprint(device),
        }
    )
    fold = study.machine.instructions is None  # where bits are pinned, the plain arithmetic
    engine = Engine(recipe, networks["target"], networks.get("guide"), precision, fold, compiled)
    return Training(engine, study.train, data, run.seed), metadata, key


def _network(run: Run, recipe: Recipe, spec: Network, channels: int) -> tuple[nn.Module, str]:
    """A network of the study and the metadata that builds it again."""
    options: dict[str, Any] = {"num_classes": run.study.data.classes, "in_channels": channels}
    options |= spec.model_dump(exclude_none=True)
    train = run.study.train
    if recipe.normalise and (train.mean or train.std):
        options |= {"mean": train.mean, "std": train.std}
    return build(**options), json.dumps(options, sort_keys=True)
