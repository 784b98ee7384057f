"""``network.onnx``: the target in eval mode with its normalisation; ``images`` to ``logits``, any batch."""

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import onnxscript  # noqa: F401  torch.onnx imports it late: what is missing is said before anything is done
import torch
from torch import Tensor

from dynat.data.splits import to_unit
from dynat.publish.agreement import compare
from dynat.publish.audited import Release

FILE = "network.onnx"


def write(release: Release, folder: Path) -> Iterator[str]:
    """Write the file and compare what onnxruntime makes of it; :class:`UserError` where it differs."""
    export(release, folder / FILE)
    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def exported(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    yield from compare(release, exported, folder)


def export(release: Release, path: Path) -> None:
    """Write a checked ONNX file: images float32 [batch,C,H,W] in [0,1] to logits [batch,classes]."""
    program = torch.onnx.export(
        release.network,
        (to_unit(release.data.test_images[:2]),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as with dynamo it is
    program.save(path)
    onnx.checker.check_model(path, full_check=True)
