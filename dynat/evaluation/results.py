"""Evidence as files: metrics, verdicts and witness of an evaluation, and the network they belong to."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dynat.evaluation.verdicts import accuracy, encode
from dynat.evaluation.whitebox import Evidence
from dynat.networks.weights import save_weights
from dynat.runtime.files import write_json


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
