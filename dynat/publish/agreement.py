"""Whether an exported network is the stored one: its logits, and every stored adversarial image."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynat.data.splits import to_unit
from dynat.errors import UserError
from dynat.methods.attacks import margins
from dynat.publish.audited import Release
from dynat.runtime.files import write_json
from dynat.runtime.progress import watched

BOUND = 1e-4  # of a logit: float32 summed in another order; as the audit allows a margin
IMAGES = 256  # test images whose logits are compared
BATCH = 250
Exported = Callable[[Tensor], Tensor]  # images float32 [N,C,H,W] in [0,1] to logits float32 [N,classes]


@torch.no_grad()
def compare(release: Release, exported: Exported, folder: Path) -> Iterator[str]:
    """Write ``agreement.json`` and tell the counts.

    Raises :class:`UserError` if a logit differs by more than ``BOUND``, or an adversarial image is no longer
    misclassified by more than that. Those within it, ties that rounding decides, are named.
    """
    images = to_unit(release.data.test_images[:IMAGES])
    difference = float((exported(images) - release.network(images)).abs().max())
    if not difference <= BOUND:
        raise UserError(f"{release.name}: exported logits differ by {difference:.3g}, more than {BOUND}")
    count, ties = 0, list[dict[str, Any]]()
    for attack, indices, adversarial in release.adversarial():
        labels = release.data.test_labels[indices]
        parts = watched(iter(adversarial.split(BATCH)), attack, -(-len(adversarial) // BATCH))
        logits = torch.cat([exported(part) for part in parts]) if len(adversarial) else torch.zeros(0, 2)
        margin = margins(logits, labels) if len(adversarial) else torch.zeros(0)
        count += len(indices)
        right = ((logits.argmax(1) == labels) | ~(margin >= 0)).nonzero().flatten().tolist()
        for place in right:
            ties.append({"attack": attack, "sample": int(indices[place]), "margin": float(margin[place])})
    beyond = [each for each in ties if not each["margin"] >= -BOUND]
    if beyond:
        which = f"{beyond[0]['attack']}, sample {beyond[0]['sample']}"
        text = f"{len(beyond)} adversarial images do not fool the exported network, such as {which}"
        raise UserError(f"{release.name}: {text}; run python -m dynat.audit {release.name} --deep")
    agreement = {
        "logits": {"images": len(images), "largest_difference": difference, "bound": BOUND},
        "adversarial": {"images": count, "misclassified": count - len(ties), "ties": ties},
    }
    write_json(folder / "agreement.json", agreement)
    yield f"logits of {len(images)} test images agree within {difference:.2g} (bound {BOUND})"
    yield f"{count - len(ties)} of {count} stored adversarial images fool the exported network"
    for each in ties:
        yield f"a tie: {each['attack']}, sample {each['sample']}, margin {each['margin']:.2g}"
