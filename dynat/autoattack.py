"""AutoAttack standard (Croce and Hein 2020) by ``pyautoattack``, in pieces that survive a stop.

One piece is one of the four attacks on one chunk of consecutive test images, those of them that are still
robust. The package's own resume cannot be used (it refuses every state file it wrote), and its randomness
depends on seed and batch, so both are parameters and chunks are cut by index.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyautoattack import AutoAttack as Package
from torch import Tensor, nn

from dynat.attacks import project
from dynat.data import to_unit
from dynat.evaluation import Evidence, join, predict
from dynat.params import AutoAttack
from dynat.workers import share

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
SQUARE_GAIN = 0.002  # the package's own threshold for "Square attack improves on white-box attacks"


class StoppedError(Exception):
    """A signal asked to leave between two pieces."""


Piece = dict[str, Any]
LoadPiece = Callable[[str], Piece | None]
SavePiece = Callable[[str, Piece], None]
Notify = Callable[[str], None]


def run(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AutoAttack,
    *,
    load: LoadPiece,
    save: SavePiece,
    notify: Notify,
    stopped: Callable[[], bool],
) -> tuple[dict[str, Evidence], list[str]] | None:
    """Attack ``network`` on uint8 ``images`` [n,C,H,W]; returns cumulative evidence and the warnings.

    The evidence "clean" and then one per attack of the standard ensemble: samples robust to it and to all
    before it. ``load`` and ``save`` keep finished pieces by name, ``notify(what)`` is called after each.
    Returns None if ``stopped`` asked to leave; on a CPU several chunks run at once and stop at once.
    """
    package = Package(
        network, norm="Linf", eps=spec.epsilon, seed=spec.seed, version="standard", device=images.device
    )

    def chunk(first: int, say: Notify) -> tuple[dict[str, Evidence], list[str]]:
        """All pieces of the chunk that begins at ``first``, from the store where they are there."""
        x, y = to_unit(images[first : first + spec.batch]), labels[first : first + spec.batch]
        nothing = torch.zeros(0, dtype=torch.long, device=x.device)
        evidence = Evidence(predict(network, x) == y, nothing, x[nothing])
        steps: dict[str, Evidence] = {"clean": evidence}
        warnings: list[str] = []
        for attack in STANDARD:
            name = f"{attack}-{first}"
            piece = load(name)
            if piece is None:
                if stopped():
                    raise StoppedError
                piece = _run_piece(package, attack, x, y, evidence.robust, spec)
                save(name, piece)
                say(f"{attack} {min(first + spec.batch, len(images))}/{len(images)}")
            evidence = steps[attack] = _add(evidence, piece)
            warnings += piece["warnings"]
        return {name: _shifted(each, first) for name, each in steps.items()}, warnings

    firsts = range(0, len(images), spec.batch)
    try:
        if images.device.type == "cpu" and spec.workers > 1:
            work = [partial(chunk, first) for first in firsts]
            if not share(work, spec.workers, notify, stopped):
                return None
        parts = [chunk(first, notify) for first in firsts]
    except StoppedError:
        return None
    joined = {name: join([part[name] for part, _ in parts]) for name in ("clean", *STANDARD)}
    warnings = list(dict.fromkeys(warning for _, warned in parts for warning in warned))
    before, after = (joined[name].robust.float().mean().item() for name in ("fab-t", "square"))
    if before - after > SQUARE_GAIN:
        points = 100 * (before - after)
        warnings.append(f"Square lowers the accuracy by {points:.2f} points: masked gradients?")
    return joined, warnings


def _run_piece(
    package: Package, attack: str, x: Tensor, y: Tensor, robust: Tensor, spec: AutoAttack
) -> Piece:
    """One attack on the still robust samples of a chunk: which of them break, and how."""
    where = robust.nonzero().squeeze(1)
    if not len(where):
        return {"broken": where.cpu(), "images": x[where].cpu(), "warnings": []}
    package.attacks_to_run = [attack]
    with _warnings() as warnings:
        adversarial, _ = package.run_standard_evaluation(x[where], y[where], batch_size=spec.batch)
    adversarial = project(adversarial, x[where], spec.epsilon)  # rounding may leave the ball by one ulp
    broken = predict(package.model, adversarial) != y[where]
    return {"broken": where[broken].cpu(), "images": adversarial[broken].cpu(), "warnings": warnings}


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
