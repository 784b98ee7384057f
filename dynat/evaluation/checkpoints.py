"""The white-box attacks on every checkpoint of a method, and checks that their accuracies can be trusted."""

from dataclasses import replace
from typing import Any

from dynat.config.attack import Attack
from dynat.evaluation.chunks import Chunk, Chunks
from dynat.evaluation.evaluate import Evaluation, TrainedNetworks
from dynat.evaluation.sanity import SAMPLES, check
from dynat.evaluation.whitebox import ATTACKS, evaluate
from dynat.runtime import distributed
from dynat.runtime.machine import precision_of

PGD = ("pgd",)
TRAIN = "last-train"  # the last epoch on training images: less the test images, it tells of overfitting
CHECKPOINTS = (
    ("best", "target", ATTACKS),
    ("last", "target.last", PGD),
    (TRAIN, "target.last", PGD),
    ("ema", "target.ema", PGD),
)


def evaluate_checkpoints(networks: TrainedNetworks, spec: Attack, chunks: Chunks) -> Evaluation:
    """Attack the selected checkpoint with everything in ``spec`` and the last one with PGD.

    On as many training images as test images (all if there are fewer) PGD-20 alone: what they are compared
    in, and so read off a longer trajectory where that of the test images is.
    """
    images, labels = networks.images[: spec.n], networks.labels[: spec.n]
    evidence, header = {}, dict[str, Any]()
    if (precision := precision_of(spec.precision, images.device)) != "fp32":
        header["precision"] = precision
    for checkpoint, name, attacks in CHECKPOINTS:
        if checkpoint == "ema" and not (networks.folder / f"{name}.safetensors").exists():
            continue
        if checkpoint == TRAIN and 20 not in spec.pgd:
            continue
        network, epoch = networks.load(name)
        header |= {f"{checkpoint}_epoch": epoch} if epoch is not None and checkpoint != TRAIN else {}
        own = replace(chunks, prefix=f"{checkpoint} ")
        if checkpoint == TRAIN:
            x, y = (each[: len(images)].to(images.device) for each in networks.train)
            steps = [20, 21] if max(spec.pgd) > 20 else [20]
            few = spec.model_copy(update={"pgd": steps})
            evidence[checkpoint] = evaluate(network, x, y, few, attacks, own)
            evidence[checkpoint].pop("pgd21", None)
        else:
            evidence[checkpoint] = evaluate(network, images, labels, spec, attacks, own)
        if epoch is None:  # trained elsewhere: there is no other epoch
            break
    if distributed.rank() > 0:
        return Evaluation(evidence, header)

    def sanity() -> Chunk:
        network, _ = networks.load("target")
        chunks.watch(network)
        guide = None
        if (networks.folder / "guide.safetensors").exists():
            guide, _ = networks.load("guide")
            chunks.watch(guide)
        return check(network, guide, images, labels, spec, evidence["best"])

    chunks.expect(1)
    return Evaluation(evidence, header, sanity=chunks.get(f"sanity 0-{min(SAMPLES, len(images))}", sanity))
