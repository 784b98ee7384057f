"""Natural, perturbed and amplified-difference images of an attack, from its witness. No torch here."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from dynat.errors import UserError

Pixels = NDArray[np.uint8]  # [C,H,W]


def perturbed(
    root: Path, setting: str, method: str, seed: int, attack: str = "pgd20", count: int = 6
) -> list[dict[str, Any]]:
    """The first ``count`` images that ``attack`` broke: index, label, and :data:`Pixels` of the three.

    natural, perturbed, and difference, amplified until the largest one of the image fills the range; grey
    means none. Empty where nothing was broken, or witness or data are not at hand; :class:`UserError` if
    they are unreadable.
    """
    witness = root / f"metrics/attack/{setting}/{method}/{seed}.witness.safetensors"
    data = root / f"data/{setting}.safetensors"
    if not (witness.exists() and data.exists()):
        return []
    try:
        with safe_open(witness, framework="numpy") as file:
            if f"best/{attack}/indices" not in file.keys():  # noqa: SIM118  not a dict
                return []
            indices = file.get_tensor(f"best/{attack}/indices")[:count]
            images = file.get_slice(f"best/{attack}/images")[: len(indices)] if len(indices) else []
        with safe_open(data, framework="numpy") as file:
            naturals = [file.get_slice("test_images")[i : i + 1][0] for i in map(int, indices)]
            labels = file.get_tensor("test_labels")[indices]
    except (OSError, SafetensorError, IndexError) as error:
        raise UserError(f"{witness}: does not fit {data} ({error}); run dvc repro") from None
    found = []
    for index, label, natural, image in zip(indices, labels, naturals, images, strict=True):
        change = image - natural / np.float32(255)
        change = 0.5 + 0.5 * change / (float(np.abs(change).max()) or 1.0)
        three = {"natural": natural, "perturbed": _grey_levels(image), "difference": _grey_levels(change)}
        found.append({"index": int(index), "label": int(label), **three})
    return found


def data_uri(pixels: Pixels) -> str:
    """An image as a BMP data URI: uncompressed, so its bytes do not depend on a compressor's version."""
    channels = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(channels.transpose(1, 2, 0))).save(file, "BMP")
    return "data:image/bmp;base64," + base64.b64encode(file.getvalue()).decode()


def _grey_levels(image: NDArray[np.float32]) -> Pixels:
    return (image * 255).round().clip(0, 255).astype(np.uint8)
