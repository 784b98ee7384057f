"""The attacks of an evaluation: per-sample verdicts and, for every broken sample, the evidence.

Evaluation is float32 in eval mode. Constants and freezing as in the published evaluator (methods.md 3.4):
a sample stays where it is as soon as it is misclassified, so it needs no further forward, and PGD-10, -20,
-50 and -100 are read off one trajectory. Unlike there, a sample that is wrong when clean counts as broken by
every attack; the published one starts from its noisy image, which may happen to be right. A sample's random
start depends on (seed, its index) alone: verdicts do not depend on the batch size. Gradients are those of the
folded network (``networks.folded``), and no sample counts as broken before the network itself, as stored,
misclassifies its image.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from dynat.config.params import Attack
from dynat.data.splits import to_unit
from dynat.evaluation.pieces import Piece, Pieces
from dynat.methods import attacks
from dynat.networks.folded import fold


@dataclass
class Evidence:
    """Outcome of an attack on n samples."""

    robust: Tensor  # bool [n]
    indices: Tensor  # int64 [b]: the samples that the attack broke although they are correct when clean
    images: Tensor  # float32 [b,C,H,W]: a misclassified image in the ball for each of them


def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: Attack,
    which: Collection[str],
    pieces: Pieces | None = None,
) -> dict[str, Evidence]:
    """Attack ``network`` with ``which`` of fgsm, pgd (every PGD-k of ``spec``), cw and apgd-ce.

    ``images`` uint8 [n,C,H,W], ``labels`` int64 [n]. With ``pieces`` each batch is one, kept and shared.
    Returns the evidence of clean, fgsm, pgd<k>, cw and apgd-ce, in that order. Raises
    :class:`dynat.evaluation.pieces.StoppedError` if ``pieces`` say so.
    """
    crafting = fold(network)

    def batch(first: int) -> Piece:
        x, y = to_unit(images[first : first + spec.batch]), labels[first : first + spec.batch]
        found = _attack_batch(network, crafting, x, y, spec, which, first)
        for evidence in found.values():
            evidence.indices += first
        return {name: vars(evidence) for name, evidence in found.items()}

    firsts = range(0, len(images), spec.batch)
    if pieces is None:
        parts = [batch(first) for first in firsts]
    else:
        pieces.watch(crafting)  # a copy of this run's own
        pieces.expect(len(firsts))
        lasts = [min(first + spec.batch, len(images)) for first in firsts]
        parts = pieces.share(
            [
                partial(pieces.get, f"{first}-{last}", partial(batch, first))
                for first, last in zip(firsts, lasts, strict=True)
            ]
        )
    return {name: join([_on(images.device, part[name]) for part in parts]) for name in parts[0]}


def _on(device: torch.device, evidence: dict[str, Tensor]) -> Evidence:
    """Evidence as it was kept, on the device."""
    return Evidence(**{name: value.to(device) for name, value in evidence.items()})


def join(parts: list[Evidence]) -> Evidence:
    """The evidence of consecutive batches as one."""
    return Evidence(
        torch.cat([part.robust for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.images for part in parts]),
    )


def _attack_batch(
    network: nn.Module,
    crafting: nn.Module,
    x: Tensor,
    y: Tensor,
    spec: Attack,
    which: Collection[str],
    first: int,
) -> dict[str, Evidence]:
    clean = predict(network, x) == y
    nothing = torch.zeros(0, dtype=torch.long, device=x.device)
    found = {"clean": Evidence(clean, nothing, x[nothing])}
    where = clean.nonzero().squeeze(1)
    x, y = x[where], y[where]

    def add(name: str, adversarial: Tensor, robust: Tensor) -> None:
        flags = clean.clone()
        flags[where] = robust
        found[name] = Evidence(flags, where[~robust], adversarial[~robust])

    start = attacks.uniform_start(x, spec.epsilon, sample_noise(x, spec.seed, first + where))
    if "fgsm" in which:
        adversarial = attacks.ascend(
            crafting, attacks.cross_entropy(y), x, x, epsilon=spec.epsilon, step=spec.epsilon, steps=1
        )
        add("fgsm", adversarial, predict(network, adversarial) == y)
    if "pgd" in which:
        for k, adversarial, robust in pgd(
            network, x, y, start, spec, spec.pgd, attacks.cross_entropy, crafting
        ):
            add(f"pgd{k}", adversarial, robust)
    if "cw" in which:
        for _, adversarial, robust in pgd(
            network, x, y, start, spec, [spec.cw_steps], attacks.margin, crafting
        ):
            add("cw", adversarial, robust)
    if "apgd-ce" in which:
        adversarial = apgd(crafting, x, y, sample_noise(x, spec.seed, first + where), spec)
        add("apgd-ce", adversarial, predict(network, adversarial) == y)
    return found


def pgd(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    spec: Attack,
    checkpoints: list[int],
    objective: Callable[[Tensor], attacks.Loss],
    crafting: nn.Module | None = None,
) -> list[tuple[int, Tensor, Tensor]]:
    """Ascend ``objective(y)`` and report (k, x', robust [B]) after each k of ``checkpoints``.

    Each verdict is that of an attack of k steps: broken samples are frozen and left out of later forwards.
    One forward of ``crafting`` (default: the network) gives an iterate's verdict and its gradient.
    """
    crafting = network if crafting is None else crafting
    adversarial = attacks.project(start, x, spec.epsilon)
    robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
    reports = []
    for step in range(max(checkpoints)):
        alive = robust.nonzero().squeeze(1)
        reached = adversarial
        if len(alive):
            verdict = _Verdict(network, adversarial[alive], y[alive])
            moved = attacks.ascend(
                crafting,
                objective(y[alive]),
                x[alive],
                verdict.images,
                epsilon=spec.epsilon,
                step=spec.step,
                steps=1,
                moving=verdict,
            )
            robust = robust.index_copy(0, alive, verdict.robust)
            adversarial = adversarial.index_copy(0, alive, moved)
        if step in checkpoints:
            reports.append((step, reached, robust))
    alive = robust.nonzero().squeeze(1)
    robust = robust.index_copy(0, alive, predict(network, adversarial[alive]) == y[alive])
    return [*reports, (max(checkpoints), adversarial, robust)]


class _Verdict:
    """Who of ``images`` [B,C,H,W] is still classified as ``labels`` [B], and so takes the next step."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.robust = torch.ones_like(labels, dtype=torch.bool)

    def __call__(self, logits: Tensor) -> Tensor:
        """The bool [B], from what the crafting network says and, where that is a success, the network."""
        suspects = (logits.argmax(1) != self.labels).nonzero().squeeze(1)
        kept = predict(self.network, self.images[suspects]) == self.labels[suspects]
        self.robust = self.robust.index_copy(0, suspects, kept)
        return self.robust


def apgd(network: nn.Module, x: Tensor, y: Tensor, noise: Tensor, spec: Attack) -> Tensor:
    """APGD on the cross entropy, one restart (Croce and Hein 2020), the APGD column of Table 4.

    Its start is the package's, from ``noise`` in [0,1) instead of draws that depend on the batch. Returns
    for each sample a misclassified iterate, or the start if there was none.
    """
    if not len(x):
        return x
    attack = APGDAttack(
        network,
        n_iter=spec.apgd_steps,
        norm="Linf",
        n_restarts=1,
        eps=spec.epsilon,
        seed=spec.seed,
        loss="ce",
        device=x.device,
    )
    attack.init_hyperparam(x)
    start = x + spec.epsilon * attack.normalize(2 * noise - 1)
    *_, adversarial = attack.attack_single_run(x, y, x_init=start)
    return attacks.project(adversarial, x, spec.epsilon)


@torch.no_grad()
def predict(network: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes int64 [B] of images float32 [B,C,H,W]; the network must be in eval mode."""
    assert not network.training, "evaluation needs eval mode, or verdicts depend on the batch"
    if not len(x):
        return torch.zeros(0, dtype=torch.long, device=x.device)
    return network(x).argmax(1)


def sample_noise(x: Tensor, seed: int, indices: Tensor) -> Tensor:
    """Uniform noise in [0,1) shaped like ``x``, each sample's from (seed, index), alike on every device."""
    noise = torch.empty(x.shape)
    for row, index in enumerate(indices.tolist()):
        digest = hashlib.sha256(f"{seed} {index}".encode()).digest()  # torch reads 32 bits of a CPU seed
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        noise[row] = torch.rand(x.shape[1:], generator=stream)
    return noise.to(x.device)
