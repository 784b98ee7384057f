"""AutoAttack standard (Croce and Hein 2020) by ``pyautoattack``, in chunks that survive a stop.

A chunk is one of the four attacks on one batch of consecutive test images, those of them that are still
robust. The package's own resume cannot be used (it refuses every state file it wrote), and its randomness
depends on seed and batch, so both are parameters and batches are cut by index.

Images are crafted with a faster equal of the network (``networks.folded``); every verdict is the float32
network's own, as stored. What it does not confirm is attacked again with itself. With a precision below fp32
the two APGD attacks are tried in it first, and who survives that is attacked as without: a sample that is
robust has withstood the whole float32 attack.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from pyautoattack import AutoAttack as Package
from torch import Tensor, nn

from dynat.config.attack import AutoAttack
from dynat.data.splits import to_unit
from dynat.evaluation.chunks import Chunk, Chunks, StoppedError
from dynat.evaluation.evaluate import Evaluation, TrainedNetworks
from dynat.evaluation.evidence import Evidence, clean, join, predict
from dynat.evaluation.square import Square
from dynat.evaluation.verdicts import Accuracy, accuracy
from dynat.methods.attacks import project
from dynat.networks.folded import crafting_copy, fold
from dynat.runtime import distributed
from dynat.runtime.machine import convolutions, precision_of
from dynat.runtime.workers import Say, allowed, share

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FEWEST_FOR_DLR = 4  # the targeted DLR loss of apgd-t reads the four largest logits
SQUARE_GAIN = 0.002  # the package's own threshold for "Square attack improves on white-box attacks"


def evaluate_selected(networks: TrainedNetworks, spec: AutoAttack, chunks: Chunks) -> Evaluation:
    """Run the standard ensemble on the selected checkpoint, at each radius that ``spec`` asks for.

    Each radius is attacked as if alone: nothing that breaks a sample at one is used at another.
    """
    network, epoch = networks.load("target")
    found, union, warnings = dict[str, Evidence](), dict[str, Accuracy](), list[str]()
    for suffix, run in spec.by_radius.items():
        images, labels = networks.images[: max(run.n)], networks.labels[: max(run.n)]
        own = spec.model_copy(update={"epsilon": run.epsilon})
        evidence, warned = evaluate(network, images, labels, own, replace(chunks, prefix=suffix.lstrip()))
        found |= {name + suffix: each for name, each in evidence.items()}
        robust = evidence[STANDARD[-1]].robust.tolist()
        union |= {f"n{n}{suffix}": accuracy(robust[:n]) for n in run.n}
        warnings += [text + suffix for text in warned]
    precision = precision_of(spec.precision, networks.images.device)
    known = {"best_epoch": epoch} if epoch is not None else {}
    header = {**known, "precision": precision, "warnings": warnings}
    return Evaluation({"best": found}, header, union)


def evaluate(
    network: nn.Module, images: Tensor, labels: Tensor, spec: AutoAttack, chunks: Chunks | None = None
) -> tuple[dict[str, Evidence], list[str]]:
    """Attack ``network`` on uint8 ``images`` [n,C,H,W] with labels int64 [n]; the evidence and the warnings.

    The evidence is that of "clean" and then one per attack of the ensemble: samples robust to it and to all
    before it. On a CPU ``spec.workers`` batches run at once, if ``chunks`` are shared. Raises
    :class:`.chunks.StoppedError` if ``chunks`` say so; the chunk at hand is dropped within a forward.
    """
    chunks = chunks or Chunks()
    ensemble = Ensemble(network, to_unit(images[:1]), spec)
    for each in ensemble.copies:  # this evaluation's own
        chunks.watch(each)

    def attack(first: int, say: Say) -> tuple[dict[str, Evidence], list[str]]:
        """All chunks of the batch that begins at ``first``, from the store where they are there."""
        x, y = to_unit(images[first : first + spec.batch]), labels[first : first + spec.batch]
        found, warnings = {"clean": clean(network, x, y)}, []
        evidence = found["clean"]
        for name in ensemble.attacks:
            make = partial(ensemble.attack, name, x, y, evidence.robust)
            chunk = chunks.get(f"{name} {first}-{first + len(x)}", make, say)
            evidence = evidence.with_broken(chunk["broken"].to(x.device), chunk["images"].to(x.device))
            found[name] = evidence
            warnings += chunk["warnings"]
        return {name: each.counted_from(first) for name, each in found.items()}, warnings

    firsts = range(0, len(images), spec.batch)
    chunks.expect(len(ensemble.attacks) * len(firsts))
    on_cpu = images.device.type == "cpu" and distributed.size() == 1
    if on_cpu and (workers := allowed(spec.workers)) > 1 and chunks.shared:  # loaded below, all of them
        work = [partial(attack, first) for first in firsts]
        if not share(work, workers, chunks.notify, chunks.stopped):
            raise StoppedError
    parts = chunks.share([partial(attack, first, chunks.notify) for first in firsts])
    found = {name: join([part[name] for part, _ in parts], images.device) for name in parts[0][0]}
    warnings = ensemble.warnings + [warning for _, warned in parts for warning in warned]
    before, after = (found[name].robust.float().mean().item() for name in ("fab-t", "square"))
    if before - after > SQUARE_GAIN:
        warnings.append(
            f"Square lowers the accuracy by {100 * (before - after):.2f} points: masked gradients?"
        )
    return found, list(dict.fromkeys(warnings))


class Ensemble:
    """The standard ensemble against ``network`` (in eval mode), one attack on one batch at a time.

    ``attacks`` are their names in order. With fewer than four classes, counted on images ``x`` float32
    [B,C,H,W], apgd-t is not among them, which is one of ``warnings``.
    """

    def __init__(self, network: nn.Module, x: Tensor, spec: AutoAttack) -> None:
        self.network, self.spec = network, spec
        self.precision = precision_of(spec.precision, x.device)
        with torch.no_grad():
            classes = int(network(x).shape[1])

        options = {"norm": "Linf", "eps": spec.epsilon, "seed": spec.seed, "version": "standard"}

        def package(crafting: nn.Module) -> Package:
            made = Package(crafting, device=x.device, **options)
            for targeted in (made.apgd_targeted, made.fab):  # nine, where there are so many others
                targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
            made.square = Square(made.square)
            return made

        exact = fold(network)
        self.packages = [
            package(exact),
            package(network),
        ]  # the second for who only the copy misreads
        self.copies, self.reduced = [exact], None
        if self.precision != "fp32":
            self.copies.append(crafting_copy(network, self.precision))
            self.reduced = package(self.copies[-1])
        self.attacks, self.warnings = list(STANDARD), list[str]()
        if classes < FEWEST_FOR_DLR:
            self.attacks.remove("apgd-t")
            self.warnings.append(f"apgd-t needs four classes, here are {classes}: left out")

    def attack(self, name: str, x: Tensor, y: Tensor, robust: Tensor) -> Chunk:
        """Attack those of ``x`` float32 [B,C,H,W], labels ``y`` int64 [B], that are ``robust``, a bool [B].

        The folded copy's attack is on them all, the network's on those whose success it did not confirm. The
        chunk holds which samples are ``broken``, int64 [b], by which ``images``, and the ``warnings``.
        """
        where = robust.nonzero().squeeze(1)
        broken, images = [where[:0]], [x[:0]]

        def run(package: Package) -> tuple[Tensor, Tensor]:
            """Of those ``where``: for whom the package claims a success, for whom the network confirms it."""
            package.attacks_to_run = [name]
            natural, labels, batch = x[where], y[where], self.spec.batch
            adversarial, predicted = package.run_standard_evaluation(natural, labels, batch_size=batch)
            # rounding may leave the ball by one ulp
            adversarial = project(adversarial, natural, self.spec.epsilon)
            confirmed = predict(self.network, adversarial) != labels
            broken.append(where[confirmed])
            images.append(adversarial[confirmed])
            return predicted != labels, confirmed

        with _warnings() as warnings:
            if self.reduced is not None and name.startswith("apgd") and len(where):
                with convolutions(self.precision):
                    _, confirmed = run(self.reduced)
                where = where[~confirmed]
            for package in self.packages:
                if len(where):
                    claimed, confirmed = run(package)
                    where = where[claimed & ~confirmed]
        return {"broken": torch.cat(broken).cpu(), "images": torch.cat(images).cpu(), "warnings": warnings}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what the package warns about; it only logs, and nothing else listens."""
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            messages.append(" ".join(record.getMessage().split()))
        return False

    logger = logging.getLogger("auto-attack")
    logger.addFilter(collect)
    try:
        yield messages
    finally:
        logger.removeFilter(collect)
