"""AutoAttack standard (Croce and Hein 2020) by ``pyautoattack``, in pieces that survive a stop.

One piece is one of the four attacks on one chunk of consecutive test images, those of them that are still
robust. The package's own resume cannot be used (it refuses every state file it wrote), and its randomness
depends on seed and batch, so both are parameters and chunks are cut by index.

Images are crafted with a faster equal of the network (``networks.folded``), in bf16 where the study asks for
it; every verdict is the float32 network's own, as stored. A success of bf16 that it does not confirm is
attacked again in float32.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from pyautoattack import AutoAttack as Package
from torch import Tensor, nn

from dynat.config.params import AutoAttack
from dynat.data.splits import to_unit
from dynat.evaluation.assessment import Model, Outcome
from dynat.evaluation.pieces import Piece, Pieces, StoppedError
from dynat.evaluation.square import Square
from dynat.evaluation.verdicts import accuracy
from dynat.evaluation.whitebox import Evidence, join, predict
from dynat.methods.attacks import project
from dynat.networks.folded import fold, mixed
from dynat.runtime import distributed
from dynat.runtime.workers import Say, share

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FEWEST_FOR_DLR = 4  # the targeted DLR loss of apgd-t reads the four largest logits
SQUARE_GAIN = 0.002  # the package's own threshold for "Square attack improves on white-box attacks"


def attack(model: Model, pieces: Pieces, spec: AutoAttack) -> Outcome:
    """Run the standard ensemble on the selected checkpoint of ``model``."""
    count = max(spec.n)
    network, epoch = model.network("target")
    found, warnings = run(network, model.images[:count], model.labels[:count], spec, pieces)
    flags = found[STANDARD[-1]].robust.tolist()
    union = {f"n{n}": accuracy(flags[:n]) for n in spec.n}
    precision = "fp32" if spec.precision == "fp32" else "mixed"
    return Outcome(
        {"best": found},
        {"best_epoch": epoch, "precision": precision, "warnings": warnings},
        {name: value["accuracy"] for name, value in union.items()},
        more={"aa": union},
        notes=tuple(warnings),
    )


def run(
    network: nn.Module, images: Tensor, labels: Tensor, spec: AutoAttack, pieces: Pieces
) -> tuple[dict[str, Evidence], list[str]]:
    """Attack ``network`` on uint8 ``images`` [n,C,H,W]; returns cumulative evidence and the warnings.

    The evidence "clean" and then one per attack of the standard ensemble: samples robust to it and to all
    before it. With fewer than four classes apgd-t is left out, which is a warning. Raises
    :class:`.pieces.StoppedError` if ``pieces`` say so; the piece at hand is dropped within a forward. On
    a CPU several chunks run at once.
    """
    crafting = [fold(network)] if spec.precision == "fp32" else [mixed(network), fold(network)]
    classes = predicted_classes(network, to_unit(images[:1]))
    packages = [_package(each, spec, images.device, classes) for each in crafting]
    for each in crafting:  # copies of this run's own
        pieces.watch(each)

    def chunk(first: int, say: Say) -> tuple[dict[str, Evidence], list[str]]:
        """All pieces of the chunk that begins at ``first``, from the store where they are there."""
        x, y = to_unit(images[first : first + spec.batch]), labels[first : first + spec.batch]
        nothing = torch.zeros(0, dtype=torch.long, device=x.device)
        evidence = Evidence(predict(network, x) == y, nothing, x[nothing])
        steps: dict[str, Evidence] = {"clean": evidence}
        warnings: list[str] = []
        for attack in STANDARD:
            if attack == "apgd-t" and classes < FEWEST_FOR_DLR:
                steps[attack] = evidence
                warnings.append(f"apgd-t needs four classes, here are {classes}: left out")
                continue
            make = partial(_run_piece, network, packages, attack, x, y, evidence.robust, spec)
            piece = pieces.get(f"{attack} {first}-{first + len(x)}", make, say)
            evidence = steps[attack] = _add(evidence, piece)
            warnings += piece["warnings"]
        return {name: _shifted(each, first) for name, each in steps.items()}, warnings

    firsts = range(0, len(images), spec.batch)
    pieces.expect((len(STANDARD) - (classes < FEWEST_FOR_DLR)) * len(firsts))
    if images.device.type == "cpu" and spec.workers > 1 and distributed.size() == 1:
        work = [partial(chunk, first) for first in firsts]
        if not share(work, spec.workers, pieces.notify, pieces.stopped):
            raise StoppedError
    parts = pieces.share([partial(chunk, first, pieces.notify) for first in firsts])
    joined = {name: join([part[name] for part, _ in parts]) for name in ("clean", *STANDARD)}
    warnings = list(dict.fromkeys(warning for _, warned in parts for warning in warned))
    before, after = (joined[name].robust.float().mean().item() for name in ("fab-t", "square"))
    if before - after > SQUARE_GAIN:
        points = 100 * (before - after)
        warnings.append(f"Square lowers the accuracy by {points:.2f} points: masked gradients?")
    return joined, warnings


def _package(crafting: nn.Module, spec: AutoAttack, device: torch.device, classes: int) -> Package:
    package = Package(
        crafting, norm="Linf", eps=spec.epsilon, seed=spec.seed, version="standard", device=device
    )
    for targeted in (package.apgd_targeted, package.fab):  # nine, where there are so many others
        targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
    package.square = Square(package.square)
    return package


@torch.no_grad()
def predicted_classes(network: nn.Module, x: Tensor) -> int:
    """How many classes the network tells apart, from its logits of images float32 [B,C,H,W]."""
    return int(network(x).shape[1])


def _run_piece(
    network: nn.Module,
    packages: list[Package],
    attack: str,
    x: Tensor,
    y: Tensor,
    robust: Tensor,
    spec: AutoAttack,
) -> Piece:
    """One attack on the still robust samples of a chunk: which of them break, and how.

    The first of ``packages`` attacks them all, the next those whose success ``network`` did not confirm.
    """
    where = robust.nonzero().squeeze(1)
    broken, images = [where[:0]], [x[:0]]
    with _warnings() as warnings:
        for package in packages:
            if not len(where):
                break
            package.attacks_to_run = [attack]
            clean, labels = x[where], y[where]
            adversarial, predicted = package.run_standard_evaluation(clean, labels, batch_size=spec.batch)
            adversarial = project(adversarial, clean, spec.epsilon)  # rounding may leave the ball by one ulp
            confirmed = predict(network, adversarial) != labels
            broken.append(where[confirmed])
            images.append(adversarial[confirmed])
            where = where[(predicted != labels) & ~confirmed]
    return {"broken": torch.cat(broken).cpu(), "images": torch.cat(images).cpu(), "warnings": warnings}


def _add(evidence: Evidence, piece: Piece) -> Evidence:
    broken, images = piece["broken"], piece["images"]
    device = evidence.robust.device
    robust = evidence.robust.clone()
    robust[broken.to(device)] = False
    indices = torch.cat([evidence.indices, broken.to(device)])
    order = indices.argsort()
    return Evidence(robust, indices[order], torch.cat([evidence.images, images.to(device)])[order])


def _shifted(evidence: Evidence, first: int) -> Evidence:
    return Evidence(evidence.robust, evidence.indices + first, evidence.images)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what the package warns about; it only logs, and nobody listens."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = " ".join(record.getMessage().split())
            if message not in messages:
                messages.append(message)

    logger, handler = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
