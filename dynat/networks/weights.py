"""Weights and other tensors as safetensors files: the same bytes for the same content, never unpickled."""

import json
import sys
from collections import OrderedDict
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dynat.errors import UserError
from dynat.networks.architectures import Normalize, build
from dynat.runtime.files import sha256, write_atomically

CODE, WITHIN = "network.py", "network"  # of a network that is none of ours: its file, and the submodule


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict and its metadata as safetensors, the same bytes for the same content."""
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    # One key, because safetensors writes several of them in a random order.
    write_atomically(path, save(plain, {"dynat": json.dumps(dict(metadata), sort_keys=True)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights (on the CPU) and metadata; a file that is not what it says is a :class:`UserError`."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            metadata = file.metadata() or {}
        return state, dict(json.loads(metadata["dynat"])) if "dynat" in metadata else metadata
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the training that writes it") from error
    except (OSError, SafetensorError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a sound safetensors file ({reason}); write it anew") from error


def load_network(path: Path, device: torch.device) -> tuple[nn.Module, int | None]:
    """The network of a weights file in eval mode, built from its metadata, and its epoch if that is known.

    Raises :class:`UserError` if file, metadata and weights do not fit together.
    """
    weights, metadata = load_weights(path)
    try:
        network = build_network(json.loads(metadata["network"]), path.parent)
        network.load_state_dict(weights, strict=True)
        epoch = int(metadata["epoch"]) if "origin" not in metadata else None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a network of this project: {reason}") from None
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if not hasattr(network, WITHIN):  # somebody's own may take a view of what it has in memory
        network.to(memory_format=torch.channels_last)
    return network.to(device).eval(), epoch


class _Source(SourceFileLoader):
    """Code as its file has it: no bytecode of an earlier one is taken, and none is written beside it."""

    def get_code(self, fullname: str) -> CodeType:
        """The code object of the file."""
        return self.source_to_code(self.get_data(self.path), self.path)


def build_network(spec: Mapping[str, Any], folder: Path) -> nn.Module:
    """The network of ``spec``: one of ours, or a class of the code in ``folder``, which is run.

    ``spec`` is what :func:`.architectures.build` takes; ``name`` may be ``file.py:Class``, which is called
    without arguments, and whose weights stand below :data:`WITHIN`. Raises :class:`UserError`.
    """
    if ":" not in spec["name"]:
        return build(**spec)
    path, name = folder / CODE, str(spec["name"].partition(":")[2])
    if sha256(path) != spec["sha256"]:
        raise UserError(f"{path}: is not the code that these weights were imported with; run dvc checkout")
    print(f"warning: {path} is code that came with these weights, and is run", file=sys.stderr)
    try:
        own = f"checkpoint_{spec['sha256'][:16]}"
        found = spec_from_loader(own, _Source(own, str(path)), origin=str(path))
        assert found is not None
        assert found.loader is not None
        module = sys.modules[found.name] = module_from_spec(found)  # where dataclasses look for it
        found.loader.exec_module(module)
        network = getattr(module, name)()
    except Exception as error:
        raise UserError(f"{path}: {name}() fails: {' '.join(repr(error).split())[:200]}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{path}: {name}() is a {type(network).__name__}, not a torch.nn.Module")
    normalised = (
        [("normalize", Normalize(spec["mean"], spec["std"], spec["in_channels"]))] if "mean" in spec else []
    )
    return nn.Sequential(OrderedDict([*normalised, (WITHIN, network)]))


def training_of(path: Path) -> dict[str, str]:
    """What a weights file says of its training: ``trained_in``, its precision, and regime; or ``origin``."""
    metadata = load_weights(path)[1]
    if "origin" in metadata:
        return {"origin": metadata["origin"]}
    own: dict[str, str] = {key: metadata[key] for key in ("regime", "weights") if key in metadata}
    return {"trained_in": metadata.get("precision", "fp32"), **own}
