"""A training before its first step: whether it can be, data, networks, engine, the key of its resume state.

Stage ``check`` asks the same before, of what params.yaml and the machine know.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynat.config.network import Network
from dynat.config.params import GUIDE, Extent, Params, Study
from dynat.config.recipe import Recipe
from dynat.data.splits import load
from dynat.errors import UserError
from dynat.methods.step import Engine
from dynat.methods.training import Training
from dynat.networks.architectures import build
from dynat.networks.weights import load_network
from dynat.runtime import distributed, machine
from dynat.runtime.closure import code_key
from dynat.runtime.files import digest, sha256
from dynat.runtime.stage import Run

BYTES = 3 * 4  # of a parameter while it is trained: itself, its gradient, its momentum


def refuse_training(params: Params, setting: str, method: str, known: Extent | None, processes: int) -> None:
    """Raise :class:`UserError`, naming a key of the study, for a training that cannot be.

    ``known`` is the data, as far as it is known; each of ``processes`` takes its slice of a batch. A frozen
    guide was refused when it was trained, or when it was imported.
    """
    study, recipe = params.study_of(setting, method), params.recipe(setting, method)
    section = f"study.{setting}"
    train, fewest = study.train, 2
    if known is not None:
        channels, side = known.shape[0], min(known.shape[1:])
        last = known.train % train.batch or train.batch
        fewest = last // processes
        if train.batch > known.train:
            text = f"{train.batch} is larger than the {known.train} training images"
            raise UserError(f"{section}.train.batch: {text}")
        if train.pad >= side:
            raise UserError(f"{section}.train.pad: {train.pad} must be below {side}, the side of an image")
        if not fewest:
            few = f"an epoch's last batch has {last} images for {processes} processes"
            raise UserError(f"{section}.train.batch: {few}; choose another batch size or fewer processes")
        if train.mean and len(train.mean) != channels:
            raise UserError(f"{section}.train.mean: must have {channels} numbers, one per channel")
    shape, needed = known.shape if known else (len(train.mean or "RGB"), 32, 32), 0
    for name, spec in _networks(study, recipe).items():
        key = f"{section}.{'guide' if method.startswith(GUIDE) else name}"
        with torch.device("meta"):
            try:
                network, _ = _network(study, recipe, spec, shape[0])
                if known is not None:
                    _forward(network, torch.empty(fewest, *shape))
            except (UserError, RuntimeError, ValueError, OverflowError, TypeError) as error:
                why = " ".join(str(error).split())[:150]
                of = f"batches of {fewest} images {shape}, as the last of an epoch" if known else "any images"
                text = why if isinstance(error, UserError) else f"cannot be trained on {of}: {why}"
                raise UserError(f"{key}: {text}") from None
        needed += BYTES * sum(each.numel() for each in network.parameters())
        if needed > (there := machine.memory_of(study.machine)):
            text = f"needs {needed / 2**30:.0f} GiB for weights, gradients and momentum so far"
            raise UserError(f"{key}: {text}, here are {there / 2**30:.0f} GiB; choose a smaller one")


def set_up(run: Run) -> tuple[Training, dict[str, str], str]:
    """The training before its first step, the metadata of its weights and its resume key.

    Needs ``data/<setting>.safetensors``; :class:`UserError` if it is missing.
    """
    study, recipe = run.study, run.params.recipe(run.setting, run.method)
    device = machine.device_of(study.machine, f"study.{run.setting}.machine")
    compiled = is_compiled(study, recipe, device.type)
    compiler = machine.compiler(f"study.{run.setting}.train.engine", device) if compiled else "none"
    distributed.join(device)
    source = Path("data", f"{run.setting}.safetensors")
    data = load(source, device)
    channels, height, width = data.train_images.shape[1:]
    known = Extent((channels, height, width), len(data.train_images), len(data.test_images))
    refuse_training(run.params, run.setting, run.method, known, distributed.size())
    torch.manual_seed(run.seed)
    networks, metadata = {}, {}
    for name, spec in _networks(study, recipe).items():
        networks[name], metadata[name] = _network(study, recipe, spec, channels)
        networks[name].to(device).to(memory_format=torch.channels_last)
    frozen = _frozen_guide(run)
    precision = machine.precision_of(study.train.precision, device)
    key = digest(
        {
            "recipe": recipe.model_dump_json(),
            "train": study.train.model_dump_json(),
            "networks": json.dumps(metadata),
            "seed": str(run.seed),
            "data": sha256(source),
            "guide": sha256(frozen) if frozen else "",
            "code": code_key("train"),
            "processes": str(distributed.size()),
            "compiler": compiler,
            "precision": precision,
            **machine.fingerprint(device),
        }
    )
    fold = study.machine.instructions is None  # where bits are pinned, the plain arithmetic
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # for all of this process, which only trains
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    guide = load_network(frozen, device)[0] if frozen else networks.get("guide")
    engine = Engine(recipe, networks["target"], guide, products, fold, compiled)
    return Training(engine, study.train, data, run.seed, precision), metadata, key


def _frozen_guide(run: Run) -> Path | None:
    """The chosen weights of the frozen guide of a run, if it has one; :class:`UserError` if not there."""
    found = run.params.guide_run(run.method, run.seed)
    if found is None:
        return None
    path = replace(run, method=found[0], seed=found[1]).path("models") / "target.safetensors"
    if not path.exists():
        stage = "import" if found[0] in run.params.checkpoint else "train_guide"
        raise UserError(f"{path}: no such file; make the guide's weights: dvc repro {stage}")
    return path


def _forward(network: nn.Module, x: Tensor) -> None:
    """Forward on the meta device up to the pooling; ``ValueError`` where batch norm has one value a channel.

    Batch norm's own forward there, and the last layer's, import the compiler, which takes seconds.
    """

    def batch_norm(x: Tensor) -> Tensor:
        if x.numel() // x.shape[1] < 2:
            raise ValueError("batch norm needs more than one value per channel")
        return x

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = batch_norm  # type: ignore[method-assign, assignment]
    for layer in network.children():
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            break
        x = layer(x)


def is_compiled(study: Study, recipe: Recipe, device_type: str) -> bool:
    """Whether ``torch.compile`` makes what the inner attack forwards on a "cuda" or "cpu" device."""
    asked = study.train.engine == "compiled" or (study.train.engine == "graph" and device_type == "cuda")
    return asked and recipe.inner.mode == "eval" and recipe.inner.steps > 0


def _networks(study: Study, recipe: Recipe) -> dict[str, Network]:
    """Those that are trained."""
    return {"target": study.target} | ({"guide": study.guide} if recipe.trains_guide else {})


def _network(study: Study, recipe: Recipe, spec: Network, channels: int) -> tuple[nn.Module, str]:
    """A network of the study and the metadata that builds it again."""
    options: dict[str, Any] = {"num_classes": study.data.classes, "in_channels": channels}
    options |= spec.model_dump(exclude_none=True)
    if recipe.normalise and study.train.mean:
        options |= {"mean": study.train.mean, "std": study.train.std}
    return build(**options), json.dumps(options, sort_keys=True)
