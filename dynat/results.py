"""Evidence as files: metrics, verdicts and witness of an evaluation, and the network they belong to."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynat.checkpoint import load_weights, save_weights, write_json
from dynat.errors import UserError
from dynat.evaluation import Evidence
from dynat.networks import build
from dynat.verdicts import accuracy, encode


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


def write_results(
    base: Path, header: dict[str, Any], found: dict[str, dict[str, Evidence]], extra: dict[str, Any]
) -> None:
    """Write ``<base>.json``, ``<base>.verdicts.json`` and ``<base>.witness.safetensors``.

    ``found`` maps a checkpoint ("best", "last") to its evidence by attack.
    """
    metrics: dict[str, Any] = dict(header)
    verdicts: dict[str, Any] = {}
    witness: dict[str, Tensor] = {}
    for checkpoint, evidence in found.items():
        flags = {name: each.robust.tolist() for name, each in evidence.items()}
        metrics[checkpoint] = {name: accuracy(each) for name, each in flags.items()}
        verdicts[checkpoint] = {
            name: {"n": len(each), "robust": encode(each)} for name, each in flags.items()
        }
        for name, each in evidence.items():
            if name != "clean":
                witness[f"{checkpoint}/{name}/indices"] = each.indices.cpu()
                witness[f"{checkpoint}/{name}/images"] = each.images.cpu()
    save_weights(base.with_name(f"{base.name}.witness.safetensors"), witness, {})
    write_json(base.with_name(f"{base.name}.verdicts.json"), verdicts)
    write_json(base.with_name(f"{base.name}.json"), {**metrics, **extra})
