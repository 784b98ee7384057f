"""Losses of the target and instance weights: choices 3 and 4 of a recipe.

Formulas and their sources: docs/methods.md, sections 3 to 12.

Logits are [B,K] of any float type and are computed on in float32 or wider; labels int64 [B]. Per-sample
functions return [B].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynat.config.guide import SoftLabels
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
    guide_adversarial: Tensor | None = None  # a frozen guide's on x'
    mirrored: Tensor | None = None  # the target's on 2x - x'
    guide_mirrored: Tensor | None = None  # a frozen guide's on 2x - x'


def soft_divergence(guide: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature² KL(softmax(guide / temperature) || softmax(logits / temperature)) per sample.

    The guide is detached (Hinton et al. 2015, section 2; docs/methods.md, section 17).
    """
    return temperature**2 * divergence(guide.detach() / temperature, logits / temperature)


def soft_terms(soft: SoftLabels, logits: Logits, scale: Tensor, alpha: float, progress: float) -> Tensor:
    """The terms of ``soft``, a scalar: of those on x' each sample counts ``scale`` [B] times.

    ``alpha`` multiplies the first, ``progress`` in (0,1], the share of epochs, IGDM's.
    """
    natural, adversarial, guide, guide_adversarial, mirrored, guide_mirrored = logits
    loss = torch.zeros((), device=adversarial.device)
    if soft.adversarial > 0:
        label = guide_adversarial if soft.at == "adversarial" else guide
        assert label is not None
        each = soft_divergence(label, adversarial, soft.temperature)
        loss = loss + alpha * soft.adversarial * (scale * each).mean()
    if soft.gradient > 0:
        assert guide_adversarial is not None
        assert guide_mirrored is not None
        assert mirrored is not None
        change = wide(guide_adversarial) - wide(guide_mirrored)
        each = soft_divergence(change, wide(adversarial) - wide(mirrored))
        loss = loss + soft.gradient * progress * (scale * each).mean()
    if soft.natural > 0:
        assert guide is not None
        assert natural is not None
        loss = loss + soft.natural * soft_divergence(guide, natural, soft.temperature).mean()
    return loss


def target_loss(
    objective: Objective,
    logits: Logits,
    truth: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    smoothing: float = 0.0,
    progress: float = 1.0,
) -> Tensor:
    """Scalar loss of the target, mean over the batch (Eq. 5 and 6; docs/methods.md, section 1).

    ``labels`` are the truth or the guide's argmax. ``alpha`` scales the adversarial term alone, as in the
    published AWP script. ``weights`` [B] multiply the terms on x', ``kl_weights`` [B], if given, in their
    stead the KL of beta. ``progress``: see :func:`soft_terms`.
    """
    natural, adversarial, guide = logits[:3]
    scale = torch.ones(len(truth), device=truth.device) if weights is None else weights
    loss = torch.zeros((), device=truth.device)
    if objective.natural_ce:
        assert natural is not None
        loss = loss + float(objective.natural_ce) * smoothed_ce(natural, truth, smoothing).mean()
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
        loss = loss + objective.beta * ((scale if kl_weights is None else kl_weights) * kl).mean()
    if objective.soft.reads_guide:
        loss = loss + soft_terms(objective.soft, logits, scale, alpha, progress)
    return loss


def instance_weights(
    rule: Weights,
    epoch: int,
    adversarial: Tensor,
    labels: Tensor,
    kappa: Tensor | None,
    steps: int,
    guide: Tensor | None = None,
) -> Tensor | None:
    """Weights [B] of the robust terms, without gradient, or None while they are uniform; IAD's A is 1 then.

    GAIRAT, of the count kappa of K = ``steps`` iterates at which a sample is classified correctly:
    (1 + tanh(Lambda + 5 (h - kappa) / h)) / 2, h = floor(K / 2), brought to mean 1 over the batch. MAIL:
    scale * sigmoid(slope * (margin + bias)) on the probabilities of the training forward, not normalised.
    Of the ``guide``'s logits [B,K] on x', IAD: p_label^power; SAAD: scale * (entropy - the batch's least).
    """
    if rule.rule == "uniform" or epoch < rule.begin:
        return torch.ones_like(wide(adversarial[:, 0])) if rule.rule == "iad" else None
    if rule.rule == "gairat":
        assert kappa is not None
        half = max(1, steps // 2)
        exponent = rule.shift + (half - kappa.to(wide(adversarial).dtype)) * 5 / half
        raw = torch.sigmoid(2 * exponent)  # the same number, without tanh's cancellation near -1
        return raw * (distributed.total(torch.ones_like(raw).sum()) / distributed.total(raw.sum()))
    if rule.by_guide:
        assert guide is not None
        logs = F.log_softmax(wide(guide.detach()), dim=1)
        if rule.rule == "iad":
            return (rule.power * logs.gather(1, labels[:, None]).squeeze(1)).exp()
        entropy = -(logs.exp() * logs).sum(1)
        return rule.scale * (entropy - distributed.least(entropy.min()))
    difficulty = margins(F.softmax(wide(adversarial.detach()), dim=1), labels)
    return rule.scale * torch.sigmoid(rule.slope * (difficulty + rule.bias))


def weights_of_terms(rule: Weights, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """:func:`instance_weights` as weights of the terms on x' and of the KL of beta; None: uniform.

    IAD's KL, of a target that guides itself, counts by what the guide is not to be trusted: 1 - A.
    """
    of_kl = 1 - weights if weights is not None and rule.rule == "iad" else weights
    return (weights if rule.terms == "all" else None), of_kl
