"""Weights and other tensors as safetensors files: the same bytes for the same content, never unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dynat.errors import UserError
from dynat.networks.architectures import build
from dynat.runtime.files import write_atomically


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


def load_network(path: Path, device: torch.device) -> tuple[nn.Module, int]:
    """The network of a weights file in eval mode, built from its metadata, and its epoch.

    Raises :class:`UserError` if file, metadata and weights do not fit together.
    """
    weights, metadata = load_weights(path)
    try:
        network = build(**json.loads(metadata["network"]))
        network.load_state_dict(weights, strict=True)
        epoch = int(metadata["epoch"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a network of this project: {reason}") from None
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.to(device).to(memory_format=torch.channels_last).eval(), epoch


def trained_in(path: Path) -> str:
    """The precision in which the weights of a file were trained, "fp32" or "bf16"."""
    return load_weights(path)[1].get("precision", "fp32")
