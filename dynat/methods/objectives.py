"""Losses of the target and instance weights: choices 3 and 4 of a recipe.

Formulas and their sources: docs/methods.md, sections 3 to 12.

Logits are [B,K] of any float type and are computed on in float32 or wider; labels int64 [B]. Per-sample
functions return [B].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynat.config.recipe import Objective, Weights
from dynat.methods.attacks import margins, wide
from dynat.runtime import distributed


def smoothed_ce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy per sample, with the label smoothed towards the uniform distribution."""
    return F.cross_entropy(wide(logits), labels, reduction="none", label_smoothing=smoothing)


def boosted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """MART's BCE per sample: -log p[y] - log(1.0001 - max_{j != y} p[j] + 1e-12) (YisenWang/MART)."""
    probabilities = F.softmax(wide(logits), dim=1)
    own = F.one_hot(labels, logits.shape[1]).bool()
    rival = probabilities.masked_fill(own, 0).amax(1)
    return smoothed_ce(logits, labels) - torch.log(1.0001 - rival + 1e-12)


def divergence(natural: Tensor, adversarial: Tensor) -> Tensor:
    """KL(p_nat || p_adv) per sample; gradient flows through both, as published (TRADES)."""
    log_natural, log_adversarial = F.log_softmax(wide(natural), 1), F.log_softmax(wide(adversarial), 1)
    return (log_natural.exp() * (log_natural - log_adversarial)).sum(1)


def mart_divergence(natural: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """MART's KL per sample, weighted by 1.0000001 - p_nat[y]; nothing is detached."""
    p_natural, p_adversarial = F.softmax(wide(natural), 1), F.softmax(wide(adversarial), 1)
    logs = torch.log(p_natural.clamp_min(torch.finfo(p_natural.dtype).tiny))
    kl = (p_natural * (logs - torch.log(p_adversarial + 1e-12))).sum(1)
    return kl * (1.0000001 - p_natural.gather(1, labels[:, None]).squeeze(1))


class Logits(NamedTuple):
    """What a loss reads, [B,K] each: None where its objective has no term that does."""

    natural: Tensor | None  # the target's on x
    adversarial: Tensor  # the target's on x'
    guide: Tensor | None  # the guide's on x


def target_loss(
    objective: Objective,
    logits: Logits,
    truth: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Scalar loss of the target, mean over the batch (Eq. 5 and 6; docs/methods.md, section 1).

    ``labels`` are the truth or the guide's argmax. ``alpha`` scales the adversarial term alone, as in the
    published AWP script. ``weights`` [B] multiply the adversarial and the KL term.
    """
    natural, adversarial, guide = logits
    scale = torch.ones(len(truth), device=truth.device) if weights is None else weights
    loss = torch.zeros((), device=truth.device)
    if objective.natural_ce:
        assert natural is not None
        loss = loss + smoothed_ce(natural, truth).mean()
    if objective.adversarial != "none":
        if objective.adversarial == "ce":
            each = smoothed_ce(adversarial, labels, smoothing)
        elif objective.adversarial == "bce":
            each = boosted_ce(adversarial, labels)
        else:
            assert guide is not None
            each = (wide(adversarial) - wide(guide)).square().mean(1)  # LBGAT's, which trains both networks
        loss = loss + alpha * (scale * each).mean()
    if objective.beta > 0:
        assert natural is not None
        plain = objective.kl == "plain"
        kl = divergence(natural, adversarial) if plain else mart_divergence(natural, adversarial, labels)
        loss = loss + objective.beta * (scale * kl).mean()
    return loss


def instance_weights(
    rule: Weights, epoch: int, adversarial: Tensor, labels: Tensor, kappa: Tensor | None, steps: int
) -> Tensor | None:
    """Weights [B] of the robust terms, without gradient, or None while they are uniform.

    GAIRAT, of the count kappa of K = ``steps`` iterates at which a sample is classified correctly:
    (1 + tanh(Lambda + 5 (h - kappa) / h)) / 2, h = floor(K / 2), brought to mean 1 over the batch. MAIL:
    scale * sigmoid(slope * (margin + bias)) on the probabilities of the training forward, not normalised.
    """
    if rule.rule == "uniform" or epoch < rule.begin:
        return None
    if rule.rule == "gairat":
        assert kappa is not None
        half = max(1, steps // 2)
        exponent = rule.shift + (half - kappa.to(wide(adversarial).dtype)) * 5 / half
        raw = torch.sigmoid(2 * exponent)  # the same number, without tanh's cancellation near -1
        return raw * (distributed.total(torch.ones_like(raw).sum()) / distributed.total(raw.sum()))
    difficulty = margins(F.softmax(wide(adversarial.detach()), dim=1), labels)
    return rule.scale * torch.sigmoid(rule.slope * (difficulty + rule.bias))
