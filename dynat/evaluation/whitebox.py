"""The white-box attacks of an evaluation: FGSM, PGD, C&W and APGD-CE.

Evaluation is in eval mode. Constants and freezing as in the published evaluator (docs/methods.md
3.4): a sample stays where it is as soon as it is misclassified, so it needs no further forward, and PGD-10,
-20, -50 and -100 are read off one trajectory. Unlike there, a sample that is wrong when clean counts as
broken by every attack; the published one starts from its noisy image, which may happen to be right. A
sample's random start depends on (seed, its index) alone: verdicts do not depend on the batch size. Gradients
are those of the folded network (``networks.folded``) in ``attack.precision``, and no sample counts as broken
before the network itself, as stored and in float32, misclassifies its image.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from dynat.config.attack import Attack
from dynat.data.splits import to_unit
from dynat.evaluation.chunks import Chunk, Chunks
from dynat.evaluation.evidence import Evidence, clean, join, predict
from dynat.methods import attacks as engine
from dynat.networks.folded import crafting_copy
from dynat.runtime.machine import convolutions, precision_of

ATTACKS = ("fgsm", "pgd", "cw", "apgd-ce")


def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: Attack,
    attacks: Collection[str],
    chunks: Chunks | None = None,
    indices: Tensor | None = None,
) -> dict[str, Evidence]:
    """Attack ``network`` with ``attacks``, some of :data:`ATTACKS`; "pgd" is every PGD-k of ``spec``.

    ``images`` uint8 [n,C,H,W], ``labels`` int64 [n]. ``indices`` int64 [n] are their places in the test
    set, on which their random starts depend, by default 0 to n-1. A batch is one of ``chunks``, by
    default made here and not kept. Returns the evidence of clean, fgsm, pgd<k>, cw and apgd-ce, in that
    order. Raises :class:`.chunks.StoppedError` if ``chunks`` say so.
    """
    chunks = chunks or Chunks()
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    precision = precision_of(spec.precision, images.device)
    crafting = crafting_copy(network, precision)
    chunks.watch(crafting)  # a copy of this evaluation's own

    def attack(part: slice) -> Chunk:
        x, y = to_unit(images[part]), labels[part]
        natural = clean(network, x, y)
        where = natural.robust.nonzero().squeeze(1)
        noise = sample_noise(x[where], spec.seed, indices[part][where])
        found = {"clean": natural}
        with convolutions(precision):
            crafted = _attack(network, crafting, x[where], y[where], noise, spec, attacks)
            for name, adversarial, robust in crafted:
                found[name] = natural.with_broken(where[~robust], adversarial[~robust])
        return {name: vars(each.counted_from(part.start)) for name, each in found.items()}

    def kept(first: int) -> Chunk:
        last = min(first + spec.batch, len(images))
        return chunks.get(f"{first}-{last}", lambda: attack(slice(first, last)))

    firsts = range(0, len(images), spec.batch)
    chunks.expect(len(firsts))
    parts = chunks.share([partial(kept, first) for first in firsts])
    return {name: join([Evidence(**part[name]) for part in parts], images.device) for name in parts[0]}


def _attack(
    network: nn.Module,
    crafting: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    spec: Attack,
    attacks: Collection[str],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, x' and robust [B] of every one of ``attacks`` on ``x`` float32 [B,C,H,W], correct when clean."""
    start = engine.uniform_start(x, spec.epsilon, noise)
    if "fgsm" in attacks:
        once = spec.model_copy(update={"step": spec.epsilon})  # from the same start, as published
        yield "fgsm", *pgd(network, x, y, start, once, [1], engine.cross_entropy, crafting)[-1][1:]
    if "pgd" in attacks:
        trajectory = pgd(network, x, y, start, spec, spec.pgd, engine.cross_entropy, crafting)
        for steps, adversarial, robust in trajectory:
            yield f"pgd{steps}", adversarial, robust
    if "cw" in attacks:
        yield "cw", *pgd(network, x, y, start, spec, [spec.cw_steps], engine.margin, crafting)[-1][1:]
    if "apgd-ce" in attacks:
        adversarial = apgd(crafting, x, y, noise, spec)
        robust = predict(network, adversarial) == y
        only = (robust & (predict(crafting, adversarial) != y)).nonzero().squeeze(1)
        with convolutions("fp32"):  # APGD stops where the copy alone errs
            again = apgd(network, x[only], y[only], noise[only], spec)
        adversarial = adversarial.index_copy(0, only, again)
        yield "apgd-ce", adversarial, predict(network, adversarial) == y


def pgd(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    spec: Attack,
    counts: list[int],
    objective: Callable[[Tensor], engine.Loss],
    crafting: nn.Module | None = None,
) -> list[tuple[int, Tensor, Tensor]]:
    """Ascend ``objective(y)`` and report (k, x', robust [B]) after each k of ``counts``.

    Each verdict is that of an attack of k steps: broken samples are frozen and left out of later forwards.
    One forward of ``crafting`` (default: the network) gives an iterate's verdict and its gradient.
    """
    crafting = network if crafting is None else crafting
    adversarial = engine.project(start, x, spec.epsilon)
    robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
    alive = torch.arange(len(x), device=x.device)

    def still_robust(logits: Tensor) -> Tensor:
        """Who of ``alive`` takes the next step: where ``crafting`` claims a success, the network judges."""
        nonlocal robust
        suspects = alive[logits.argmax(1) != y[alive]]
        robust = robust.index_copy(0, suspects, predict(network, adversarial[suspects]) == y[suspects])
        return robust[alive]

    ascend = partial(engine.ascend, crafting, epsilon=spec.epsilon, step=spec.step, steps=1)
    reports = []
    for step in range(max(counts)):
        alive, reached = robust.nonzero().squeeze(1), adversarial
        if len(alive):
            moved = ascend(objective(y[alive]), x[alive], adversarial[alive], moving=still_robust)
            adversarial = adversarial.index_copy(0, alive, moved)
        if step in counts:
            reports.append((step, reached, robust))
    alive = robust.nonzero().squeeze(1)
    robust = robust.index_copy(0, alive, predict(network, adversarial[alive]) == y[alive])
    return [*reports, (max(counts), adversarial, robust)]


def apgd(network: nn.Module, x: Tensor, y: Tensor, noise: Tensor, spec: Attack) -> Tensor:
    """APGD on the cross entropy, one restart (Croce and Hein 2020), the APGD column of Table 4.

    Its start is the package's, from ``noise`` in [0,1) instead of draws that depend on the batch. Returns
    for each sample a misclassified iterate, or the start if there was none.
    """
    if not len(x):
        return x
    attack = APGDAttack(
        network, n_iter=spec.apgd_steps, eps=spec.epsilon, seed=spec.seed, loss="ce", device=x.device
    )
    attack.init_hyperparam(x)
    start = x + spec.epsilon * attack.normalize(2 * noise - 1)
    *_, adversarial = attack.attack_single_run(x, y, x_init=start)
    return engine.project(adversarial, x, spec.epsilon)


def sample_noise(x: Tensor, seed: int, indices: Tensor) -> Tensor:
    """Uniform noise in [0,1) shaped like ``x``, each sample's from (seed, index), alike on every device."""
    noise = torch.empty(x.shape)
    for row, index in enumerate(indices.tolist()):
        digest = hashlib.sha256(f"{seed} {index}".encode()).digest()  # torch reads 32 bits of a CPU seed
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        noise[row] = torch.rand(x.shape[1:], generator=stream)
    return noise.to(x.device)
