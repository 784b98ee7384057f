"""One attack engine for training and evaluation: signed gradient ascent inside an l-infinity ball.

Images are float32 [B,C,H,W] in [0,1], labels int64 [B], epsilon and step in the same unit as the images.
What an attack maximises, who still moves and where it starts are arguments; their constants stand in
docs/methods.md, sections 1 and 3.4.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
Loss = Callable[..., Tensor]  # of the target's logits, and of what moves along with the iterate
Moving = Callable[[Tensor], Tensor]


def wide(logits: Tensor) -> Tensor:
    """Logits in at least float32: losses are never summed in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def project(adversarial: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """The nearest point to ``adversarial`` in the epsilon-ball around ``images`` and in [0,1]."""
    low, high = (images - epsilon).clamp_(min=0), (images + epsilon).clamp_(max=1)
    return torch.minimum(torch.maximum(adversarial, low), high)


def uniform_start(images: Tensor, epsilon: float, noise: Tensor, clamp: bool = True) -> Tensor:
    """Start of PGD (Madry et al. 2018): ``noise`` uniform in [0,1) becomes U(-epsilon, epsilon).

    Without ``clamp`` it may lie outside [0,1] until the first step (ARD).
    """
    start = images + (2 * noise - 1) * epsilon
    return project(start, images, epsilon) if clamp else start


def gaussian_start(images: Tensor, scale: float, noise: Tensor) -> Tensor:
    """Start of TRADES: ``scale`` times standard normal ``noise``, not clamped before the first step."""
    return images + scale * noise


def ascend(
    forward: Forward,
    loss: Loss,
    images: Tensor,
    start: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    moving: Moving | None = None,
    jitter: Tensor | None = None,
    along: Forward | None = None,
) -> Tensor:
    """Maximise ``loss(forward(x'))`` by ``steps`` signed gradient steps from ``start``.

    ``loss`` maps logits [B,K] to a scalar that is a sum over samples. ``moving`` maps the logits of an
    iterate, before its step, to the bool [B] of samples that take the step; the others keep their iterate.
    ``jitter`` [steps,B,C,H,W] is added at each step before the projection (FAT's omega). With ``along`` the
    loss is ``loss(forward(x'), along(x'))``, and the gradient flows through both. Only the gradient with
    respect to the input is computed. Returns x', detached, inside the ball and [0,1].
    """
    adversarial = start.detach()
    for index in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            logits = forward(adversarial)
            value = loss(logits) if along is None else loss(logits, along(adversarial))
            (gradient,) = torch.autograd.grad(value, adversarial)
        with torch.no_grad():
            moved = adversarial + step * gradient.sign()
            if jitter is not None:
                moved = moved + jitter[index]
            moved = project(moved, images, epsilon)
            if moving is not None:
                keep = ~moving(logits.detach())
                moved = torch.where(keep[:, None, None, None], adversarial, moved)
            adversarial = moved
    return project(adversarial.detach(), images, epsilon)


def cross_entropy(labels: Tensor) -> Loss:
    """Sum of CE(logits, labels), Eq. 2; with the guide's labels it is Eq. 7 ("Inner")."""
    return lambda logits: F.cross_entropy(wide(logits), labels, reduction="sum")


def kl_from(natural_logits: Tensor) -> Loss:
    """Sum of KL(softmax(natural_logits) || softmax(logits)), TRADES' inner objective."""
    target = F.softmax(wide(natural_logits.detach()), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(wide(logits), dim=1), target, reduction="sum")


def kl_between(logits: Tensor, partner: Tensor) -> Tensor:
    """Sum of KL(softmax(partner) || softmax(logits)), AdaAD's inner objective; nothing is detached."""
    log_partner, log_own = F.log_softmax(wide(partner), dim=1), F.log_softmax(wide(logits), dim=1)
    return (log_partner.exp() * (log_partner - log_own)).sum()


def linear_in_truth(forward: Forward, images: Tensor, labels: Tensor) -> Forward:
    """Logits of ``forward`` on ``images`` with the true class to first order in the iterate (SAAD).

    x' -> z(x) + e_y <grad z_y(x), x' - x>; one forward and one backward of ``forward`` here, none after.
    """
    with torch.enable_grad():
        point = images.detach().requires_grad_()
        logits = wide(forward(point))
        (slope,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), point)
    natural, own = logits.detach(), F.one_hot(labels, logits.shape[1])
    return lambda adversarial: (
        natural + own * (slope * (adversarial - images)).flatten(1).sum(1, keepdim=True)
    )


def margin(labels: Tensor) -> Loss:
    """Sum of max_{j != y} z_j - z_y, the C&W loss of docs/methods.md, section 3.4."""
    return lambda logits: margins(logits, labels).sum()


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """max_{j != label} score_j - score_label, per sample [B]; positive means misclassified."""
    own = F.one_hot(labels, scores.shape[1]).bool()
    return scores.masked_fill(own, -torch.inf).amax(1) - scores.gather(1, labels[:, None]).squeeze(1)


class EarlyStop:
    """Who still moves under FAT's or SAT's rule; its state is the budget left of each sample.

    A sample whose difficulty exceeds ``threshold`` with no budget left stays where it is; with budget left
    it goes on and one unit is used up (FAT, zjfheart/Friendly-Adversarial-Training).
    """

    def __init__(self, labels: Tensor, threshold: float, budget: int) -> None:
        self.labels, self.threshold = labels, threshold
        self.left = torch.full_like(labels, budget)
        self.frozen = torch.zeros_like(labels, dtype=torch.bool)

    def __call__(self, logits: Tensor) -> Tensor:
        """The bool [B] of samples that take the next step, given the logits of this iterate."""
        difficulty = margins(F.softmax(wide(logits), dim=1), self.labels)
        hard = (difficulty > self.threshold) & ~self.frozen
        self.frozen |= hard & (self.left == 0)
        self.left -= (hard & ~self.frozen).long()
        return ~self.frozen


class CorrectSteps:
    """Counts kappa, at how many of the iterates a sample is still classified as ``labels`` (GAIRAT)."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.kappa = torch.zeros_like(labels)

    def __call__(self, logits: Tensor) -> Tensor:
        """Count this iterate; everybody goes on."""
        self.kappa += (logits.argmax(1) == self.labels).long()
        return torch.ones_like(self.labels, dtype=torch.bool)
