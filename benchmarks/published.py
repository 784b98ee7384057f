"""Training steps as the published codes spend their time: what the engine's speed is measured against.

Plain float32 PyTorch, forward by forward as methods.md describes the originals: contiguous tensors,
``torch.optim.SGD``, parameters that keep requiring gradients during the attack, the guide or the natural
prediction recomputed at every inner step, forwards whose output nobody reads. Random draws come from the
batch, so that both sides train on the same numbers. Shapes as in :class:`dynat.methods.batches.Batch`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynat.config.recipe import Recipe
from dynat.methods.batches import Batch

Losses = tuple[Tensor, Tensor]  # of the target and of the guide, before the update
InnerLoss = Callable[[Tensor], Tensor]  # the iterate -> a scalar to be maximised


class Published:
    """Target, guide and optimiser of a published run of ``recipe``, whose constants it takes.

    Raises ``ValueError`` for a method that has no transcription here.
    """

    def __init__(self, method: str, recipe: Recipe, target: nn.Module, guide: nn.Module | None) -> None:
        if method not in STEPS:
            raise ValueError(f"no transcription of {method}: choose one of {', '.join(STEPS)}")
        self.recipe, self.target, self.guide = recipe, target, guide
        networks = [network for network in (target, guide) if network is not None]
        parameters: list[Any] = [parameter for network in networks for parameter in network.parameters()]
        schedule = recipe.schedule
        self.optimizer = torch.optim.SGD(
            parameters, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )
        self._step = STEPS[method]

    def step(self, batch: Batch) -> Losses:
        """Train on one batch."""
        of_target, of_guide = self._step(self, batch)
        return of_target.detach(), of_guide.detach()


def clip(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Back into the ball around ``x`` and into [0,1]."""
    return torch.clamp(torch.min(torch.max(x_adv, x - epsilon), x + epsilon), 0.0, 1.0)


def gaussian_attack(run: Published, batch: Batch, loss: InnerLoss) -> Tensor:
    """The loop of TRADES, which LBGAT and DYNAT share: the gradient is asked for the iterate alone."""
    inner, x = run.recipe.inner, batch.images
    run.target.eval()
    x_adv = x.detach() + inner.noise * batch.start
    for _ in range(inner.steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x_adv), [x_adv])
        x_adv = clip(x_adv.detach() + inner.step * torch.sign(gradient.detach()), x, inner.epsilon)
    run.target.train()
    return torch.clamp(x_adv, 0.0, 1.0)


def to_natural(run: Published, x: Tensor) -> InnerLoss:
    """TRADES' KL to the natural prediction, which is recomputed, graph and all, at every step."""
    return lambda x_adv: F.kl_div(
        F.log_softmax(run.target(x_adv), dim=1), F.softmax(run.target(x), dim=1), reduction="sum"
    )


def natural(run: Published, batch: Batch) -> Losses:
    """Training without an adversary."""
    run.target.train()
    loss = F.cross_entropy(run.target(batch.images), batch.truth)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    return loss, torch.zeros(())


def pgd_at(run: Published, batch: Batch) -> Losses:
    """locuslab/robust_overfitting: train mode throughout, ``backward`` into the weights at every step."""
    inner, x, y, target = run.recipe.inner, batch.images, batch.truth, run.target
    target.train()
    delta = clip(x + (2 * batch.start - 1) * inner.epsilon, x, inner.epsilon) - x
    delta.requires_grad_()
    for _ in range(inner.steps):
        F.cross_entropy(target(x + delta), y).backward()
        assert delta.grad is not None
        moved = delta.detach() + inner.step * torch.sign(delta.grad.detach())
        delta.data = clip(x + moved, x, inner.epsilon) - x
        delta.grad.zero_()
    F.cross_entropy(target(x + delta), y, reduction="none")  # which restart is worst, of one
    loss = F.cross_entropy(target(clip(x + delta.detach(), x, inner.epsilon)), y)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    F.cross_entropy(target(x), y)  # for the log
    return loss, torch.zeros(())


def trades(run: Published, batch: Batch) -> Losses:
    """yaodongyu/TRADES: three forwards in the outer step, the natural prediction twice."""
    x, y, target = batch.images, batch.truth, run.target
    x_adv = gaussian_attack(run, batch, to_natural(run, x))
    run.optimizer.zero_grad()
    loss = F.cross_entropy(target(x), y)
    robust = F.kl_div(F.log_softmax(target(x_adv), dim=1), F.softmax(target(x), dim=1), reduction="batchmean")
    loss = loss + run.recipe.outer.beta * robust
    loss.backward()
    run.optimizer.step()
    return loss, torch.zeros(())


def dynat(run: Published, batch: Batch) -> Losses:
    """lusti-Yu/Dynamic-label, dynat.py: the label inside the loop and, with it, the guide's forward."""
    x, y, target, guide = batch.images, batch.truth, run.target, run.guide
    assert guide is not None
    guide.train()

    def to_label(x_adv: Tensor) -> Tensor:
        return F.cross_entropy(target(x_adv), guide(x).argmax(dim=1))

    dynamic = run.recipe.inner.loss == "ce_dynamic"
    x_adv = gaussian_attack(run, batch, to_label if dynamic else to_natural(run, x))
    run.optimizer.zero_grad()
    on_adversarial, on_natural, of_guide = target(x_adv), target(x), guide(x)
    F.kl_div(  # computed and dropped
        F.log_softmax(on_adversarial, dim=1), F.softmax(on_natural, dim=1), reduction="batchmean"
    )
    target_loss = run.recipe.alpha * F.cross_entropy(on_adversarial, of_guide.argmax(dim=1))
    guide_loss = F.cross_entropy(of_guide, y)
    (target_loss + guide_loss).backward()
    run.optimizer.step()
    return target_loss, guide_loss


STEPS: dict[str, Callable[[Published, Batch], Losses]] = {
    "natural": natural,
    "pgd_at": pgd_at,
    "trades": trades,
    "dynat": dynat,
    "dynat_inner": dynat,
}
