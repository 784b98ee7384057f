"""Weights that somebody else trained, made into a state dict of one of the networks here.

Files as people have them: saved by ``torch.save`` or as safetensors, bare or under a key, from a network that
was wrapped, in half precision, with the normalisation of its input inside. Nothing in a file is run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynat.config.network import Checkpoint
from dynat.data.splits import to_unit
from dynat.errors import UserError
from dynat.networks.architectures import build
from dynat.networks.weights import WITHIN, build_network, load_network, load_weights, save_weights

FEW = 3  # names of each kind in a message
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # of DataParallel and torch.compile, at any depth
CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}  # last part of a name -> what it is
State = Mapping[str, Tensor]


class Fitted(NamedTuple):
    """A state dict for a network, and what its file normalises the input with, if it does."""

    state: dict[str, Tensor]  # float32
    constants: dict[str, list[float]]  # "mean" and "std" per channel, or empty


def import_weights(
    given: Checkpoint, file: Path, folder: Path, images: Tensor, classes: int
) -> dict[str, Any]:
    """Write ``target.safetensors`` into ``folder`` from ``file``; returns what its network is built from.

    ``images`` uint8 [N,C,H,W] are some of those to be classified. The code of a network that is none of ours
    lies in ``folder`` already. Raises :class:`UserError` where weights, network and images do not fit.
    """
    channels = images.shape[1]
    spec = {**given.spec, "num_classes": classes, "in_channels": channels}
    below = f"{WITHIN}." if given.module else ""
    network = build_network(spec, folder).get_submodule(below.rstrip("."))
    fitted = fit(read_state(file, given.entry), network, channels)
    for key, values in fitted.constants.items():
        if not torch.tensor(spec.setdefault(key, values)).allclose(torch.tensor(values)):
            text = f"{spec[key]}, but in the file it is {values}; set mean and std to null"
            raise UserError(f"{key}: {text}")
    target, metadata = folder / "target.safetensors", {"network": json.dumps(spec, sort_keys=True)}
    weights = {below + name: each for name, each in fitted.state.items()}
    save_weights(target, weights, metadata | {"origin": given.origin})
    network, _ = load_network(target, torch.device("cpu"))
    try:
        logits = network(to_unit(images))
    except Exception as error:  # somebody's code raises anything
        raise UserError(f"images {list(images.shape[1:])}: {' '.join(repr(error).split())[:200]}") from None
    if not isinstance(logits, Tensor):
        raise UserError(f"gives a {type(logits).__name__} for images, not a tensor of logits")
    if logits.shape != (len(images), classes):
        raise UserError(f"gives logits {list(logits.shape)} for {len(images)} images of {classes} classes")
    if not logits.isfinite().all():
        raise UserError("gives logits that are not finite; its weights are damaged")
    return spec


def read_state(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, under the key ``entry`` or the only one there; on the CPU.

    Raises :class:`UserError` for a file that holds code or no weights, and for several state dicts without
    ``entry``.
    """
    if path.suffix == ".safetensors":
        content: Any = load_weights(path)[0]
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive or pickle raises nearly anything
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it holds a {refused[1]}, which only code can make" if refused else type(error).__name__
            advice = "save the state dict alone: torch.save(network.state_dict(), path)"
            raise UserError(f"{path}: weights alone cannot be read ({reason}); {advice}") from None
    if entry is not None:
        if not isinstance(content, Mapping) or not _is_state(content.get(entry)):
            raise UserError(f"{path}: has no state dict under {entry!r}; it has {_keys(content)}")
        return _plain(content[entry])
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    within = [str(key) for key, value in content.items() if _is_state(value)]
    if len(within) + _is_state(content) > 1:
        names = [*within, *(["the file itself"] * _is_state(content))]
        raise UserError(f"{path}: has several state dicts, {', '.join(names)}; choose one with entry")
    found = _plain(content[within[0]] if within else content)
    if not found:
        raise UserError(f"{path}: holds no weights; it has {_keys(content)}")
    return found


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def _plain(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict by their names without wrappers, floats in single precision."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            plain = WRAPPERS.sub("", str(name))
            if plain in found:
                raise UserError(f"the file has {plain} twice, once below {name}; save one network alone")
            found[plain] = value.float() if value.is_floating_point() else value
    return found


def _keys(content: object) -> str:
    return some([str(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more if names else "nothing"


def fit(state: State, network: nn.Module, channels: int) -> Fitted:
    """``state`` under the names of ``network``, which may stand below any prefix in it.

    Left out is what no forward reads: the ``sub_block1`` of TRADES' file (docs/methods.md 15) and constants
    that normalise ``channels`` of the input, which are returned. Old files lack the counters of batch norm:
    they are 0. Raises :class:`UserError` with the first names on either side, and the network that would fit.
    """
    wanted = network.state_dict()
    prefix = _prefix(state, wanted)
    below = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = {name: value for name, value in below.items() if name in wanted}
    rest = {name: value for name, value in state.items() if name.removeprefix(prefix) not in own}
    normalising = {name: value for name, value in rest.items() if _constant(name, value, channels)}
    kinds = sorted(CONSTANTS[name.rpartition(".")[2]] for name in normalising)
    if kinds != ["mean", "std"]:  # one alone, or two normalisations, are none that can be taken over
        normalising = {}
    unused = {name for name in rest if name.removeprefix(prefix).startswith("sub_block1.")} | {"n_averaged"}
    odd = [name for name in rest if name not in normalising and name not in unused]
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            own.setdefault(name, torch.zeros_like(value))
    missing = [name for name in wanted if name not in own]
    shapes = [
        f"{name} {list(own[name].shape)} for {list(value.shape)}"
        for name, value in wanted.items()
        if name in own and own[name].shape != value.shape
    ]
    if odd or missing or shapes:
        faults = {"lacks": missing, "has besides": odd, "has shapes": shapes}
        text = "; ".join(f"{what} {some(names)}" for what, names in faults.items() if names)
        spec = inferred(_from_the_stem({k: v for k, v in state.items() if not _constant(k, v, channels)}))
        raise UserError(f"the file {text}" + (f"; it fits {_written(spec)}" if spec else ""))
    constants: dict[str, list[float]] = {
        CONSTANTS[name.rpartition(".")[2]]: value.flatten().expand(channels).tolist()
        for name, value in normalising.items()
    }
    if not all(0 <= value <= 1 for value in constants.get("mean", ())):
        raise UserError(f"the file takes off a mean of {constants['mean']}, where pixels are in [0,1]")
    return Fitted({name: own[name] for name in wanted}, constants)


def _prefix(state: State, wanted: State) -> str:
    """What stands before the names of a network in a file that holds more: that of the most names."""
    first = [name[: -len(own)] for own in wanted for name in state if name.endswith(f".{own}")]
    counts = {prefix: sum(f"{prefix}{name}" in state for name in wanted) for prefix in {"", *first}}
    return max(sorted(counts), key=lambda prefix: (counts[prefix], -len(prefix)))


def _from_the_stem(state: State) -> State:
    """A state under the names of the network whose first convolution stands the least deep."""
    stems = [name for name in state if name.endswith("conv1.weight")]
    prefix = min(stems, key=lambda name: name.count("."), default="").removesuffix("conv1.weight")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _constant(name: str, value: Tensor, channels: int) -> bool:
    return name.rpartition(".")[2] in CONSTANTS and value.numel() in (1, channels)


def inferred(state: State) -> dict[str, Any] | None:
    """Name and options of the network here that has these names and shapes; None if there is none.

    Strides leave no trace in weights: those of the default are taken.
    """
    try:
        stem, blocks = state["conv1.weight"], _counted(state, r"layer(\d+)\.(\d+)\.")
        if "fc.weight" in state:
            head, wide = state["fc.weight"], _counted(state, r"block(\d+)\.layer\.(\d+)\.")
            spec: dict[str, Any] = {"name": "wrn", "depth": 6 * wide[0] + 4, "widen": head.shape[1] // 64}
        else:
            head, kind = state["linear.weight"], "preact_resnet" if "bn.weight" in state else "resnet"
            strides = [1] + [2] * (len(blocks) - 1)
            spec = {"name": kind, "blocks": blocks, "strides": strides, "width": len(stem)}
        with torch.device("meta"):
            network = build(num_classes=len(head), in_channels=stem.shape[1], **spec)
    except (KeyError, IndexError, TypeError, UserError):
        return None
    shapes, there = (
        {name: value.shape for name, value in each.items() if not name.endswith("num_batches_tracked")}
        for each in (network.state_dict(), state)
    )
    there = {name: shape for name, shape in there.items() if not name.startswith("sub_block1.")}
    return spec | {"classes": len(head)} if shapes == there else None


def _counted(state: State, pattern: str) -> list[int]:
    """Blocks of each stage, by names that have the numbers of stage and block."""
    found: dict[int, int] = {}
    for match in filter(None, (re.match(pattern, name) for name in state)):
        found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]) + 1)
    return [found[stage] for stage in sorted(found)]


def _written(spec: Mapping[str, Any]) -> str:
    """A network as params.yaml writes it, and the number of its classes."""
    options = ", ".join(f"{key}: {value}" for key, value in spec.items() if key != "classes")
    return f"network: {{{options}}} with {spec['classes']} classes"
