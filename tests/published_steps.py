"""Training steps as the published codes take them, forward by forward (methods.md 1, 3-12).

Every forward of the original is repeated in its order: no cached label, no closed form, natural logits
recomputed, SGD by hand. Only the random draws come from the batch, so that both sides share them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from helpers import add_to_weights, ce, kl, proxy_perturbation
from torch import Tensor, nn

from dynat.methods.batches import Batch

Objective = Callable[[Tensor], Tensor]  # logits -> loss per sample


@dataclass
class Published:
    """The networks of a published run and its hand-written SGD."""

    t: nn.Module
    g: nn.Module
    weight_decay: float
    lr: float = 0.0
    epoch: int = 0
    momentum: dict[int, Tensor] = field(default_factory=dict)

    def update(self, loss: Tensor) -> None:
        for parameter in [*self.t.parameters(), *self.g.parameters()]:
            parameter.grad = None
        loss.backward()
        for parameter in [*self.t.parameters(), *self.g.parameters()]:
            if parameter.grad is not None:
                change = parameter.grad + self.weight_decay * parameter.detach()
                if id(parameter) in self.momentum:
                    change = 0.9 * self.momentum[id(parameter)] + change
                self.momentum[id(parameter)] = change
                parameter.data -= self.lr * change


Step = Callable[[Published, Batch], tuple[Tensor, Tensor]]  # -> losses of the target and of the guide


def climb(
    t: nn.Module, objective: Objective, x: Tensor, start: Tensor, epsilon: float, step: float
) -> Tensor:
    x_adv = start
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(t(x_adv)).mean(), x_adv)
        x_adv = x_adv.detach() + step * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv


def near(batch: Batch) -> Tensor:
    return batch.images + 0.001 * batch.start


def anywhere(batch: Batch, epsilon: float) -> Tensor:
    return (batch.images + (2 * batch.start - 1) * epsilon).clamp(0, 1)


def margin(z: Tensor, labels: Tensor) -> Tensor:
    p = z.detach().softmax(1)
    return torch.stack(
        [max(row[j] for j in range(3) if j != y) - row[y] for row, y in zip(p, labels.tolist(), strict=True)]
    )


def smoothed(z: Tensor, labels: Tensor, amount: float) -> Tensor:
    """Cross entropy to labels that give ``amount`` to all classes alike."""
    return (1 - amount) * ce(z, labels) - amount * z.log_softmax(1).mean(1)


NONE = torch.zeros((), dtype=torch.float64)


def dynat(
    inner: str,
    alpha: float = 1.0,
    beta: float = 0.0,
    awp: bool = False,
    guide: int = 1,
    smoothing: float = 0.0,
) -> Step:
    """dynat.py and AWP_dynat.py; ``guide`` counts the guide's forwards outside the inner loop.

    Not theirs is ``smoothing``, of the target's label.
    """

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, g, x, y = run.t, run.g.train(), batch.images, batch.truth
        t.eval()
        inner_loss: Objective = {
            "dynamic": lambda z: ce(z, g(x).argmax(1)),
            "kl": lambda z: kl(t(x), z),
            "ce": lambda z: ce(z, y),
        }[inner]
        x_adv = climb(t, inner_loss, x, near(batch), 0.031, 0.007)
        t.train()
        v = {}
        if awp and run.epoch >= 9:
            v = proxy_perturbation(t, lambda w: ce(w(x), y).mean() + 6 * kl(w(x), w(x_adv)).mean(), 0.005)
        add_to_weights(t, v, +1)
        z_adv, z = t(x_adv), t(x)
        for _ in range(guide):
            z_g = g(x)
        of_target = alpha * smoothed(z_adv, z_g.argmax(1), smoothing).mean() + beta * kl(z, z_adv).mean()
        of_guide = ce(z_g, y).mean()
        run.update(of_target + of_guide)
        add_to_weights(t, v, -1)
        return of_target, of_guide

    return step


def trades(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    t, x, y = run.t.eval(), batch.images, batch.truth
    x_adv = climb(t, lambda z: kl(t(x), z), x, near(batch), 0.031, 0.007)
    t.train()
    of_target = ce(t(x), y).mean()
    z_adv = t(x_adv)
    of_target = of_target + 6 * kl(t(x), z_adv).mean()
    run.update(of_target)
    return of_target, NONE


def trades_awp(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    t, x, y = run.t.eval(), batch.images, batch.truth
    x_adv = climb(t, lambda z: kl(t(x), z), x, near(batch), 8 / 255, 2 / 255)
    t.train()
    v = {}
    if run.epoch >= 9:
        v = proxy_perturbation(t, lambda w: ce(w(x), y).mean() + 6 * kl(w(x), w(x_adv)).mean(), 0.005)
    add_to_weights(t, v, +1)
    z_adv = t(x_adv)
    robust = 6 * kl(t(x), z_adv).mean()
    of_target = ce(t(x), y).mean() + robust
    run.update(of_target)
    add_to_weights(t, v, -1)
    return of_target, NONE


def rice(awp: bool, loss_check: bool) -> Step:
    """PGD-AT and AT-AWP: train-mode attack, its loss check, training and logging forwards."""

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, x, y = run.t.train(), batch.images, batch.truth
        x_adv = climb(t, lambda z: ce(z, y), x, anywhere(batch, 8 / 255), 8 / 255, 2 / 255)
        if loss_check:
            t(x_adv)
        v = proxy_perturbation(t, lambda w: ce(w(x_adv), y).mean(), 0.01) if awp else {}
        add_to_weights(t, v, +1)
        of_target = ce(t(x_adv), y).mean()
        run.update(of_target)
        add_to_weights(t, v, -1)
        t(x)
        return of_target, NONE

    return step


def natural(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    of_target = ce(run.t.train()(batch.images), batch.truth).mean()
    run.update(of_target)
    return of_target, NONE


def lbgat(beta: float, awp: str = "") -> Step:
    """LBGAT; ``awp`` perturbs its weights, for which there is no published code.

    By the cross entropy to the guide's "label", or from epoch 9 by TRADES-AWP's objective ("trades").
    """

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, g, x, y = run.t.eval(), run.g.train(), batch.images, batch.truth
        x_adv = climb(t, lambda z: kl(t(x), z), x, near(batch), 0.031, 0.007)
        t.train()
        z_g = g(x)
        v = {}
        if awp == "label":
            v = proxy_perturbation(t, lambda w: ce(w(x_adv), z_g.argmax(1)).mean(), 0.005)
        elif awp == "trades" and run.epoch >= 9:
            v = proxy_perturbation(t, lambda w: ce(w(x), y).mean() + 6 * kl(w(x), w(x_adv)).mean(), 0.005)
        add_to_weights(t, v, +1)
        z_adv, z = t(x_adv), t(x)
        of_target = ((z_adv - z_g) ** 2).sum() / z_g.numel() + beta * kl(z, z_adv).mean()
        of_guide = ce(z_g, y).mean()
        run.update(of_target + of_guide)
        add_to_weights(t, v, -1)
        return of_target, of_guide

    return step


def mart(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    t, x, y = run.t.eval(), batch.images, batch.truth
    x_adv = climb(t, lambda z: ce(z, y), x, near(batch), 0.031, 0.007)
    t.train()
    z, z_adv = t(x), t(x_adv)
    p, p_adv = z.softmax(1), z_adv.softmax(1)
    total = NONE
    for i, label in enumerate(y.tolist()):
        rival = max(p_adv[i, j] for j in range(3) if j != label)
        total = total - p_adv[i, label].log() - (1.0001 - rival + 1e-12).log()
        divergence = sum(p[i, j] * (p[i, j].log() - (p_adv[i, j] + 1e-12).log()) for j in range(3))
        total = total + 5 * divergence * (1.0000001 - p[i, label])
    run.update(total / len(y))
    return total / len(y), NONE


def mail(inner: str, begin: int) -> Step:
    """MAIL-AT (inner ce) and MAIL-TRADES (kl)."""

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, x, y = run.t.eval(), batch.images, batch.truth
        objective: Objective = (lambda z: kl(t(x), z)) if inner == "kl" else (lambda z: ce(z, y))
        x_adv = climb(t, objective, x, near(batch), 0.031, 0.007)
        t.train()
        if inner == "kl":
            z = t(x)
            z_adv = t(x_adv)
            natural_part, each, (slope, bias) = ce(z, y).mean(), 5 * kl(z, z_adv), (2, 0.0)
        else:
            z_adv = t(x_adv)
            natural_part, each, (slope, bias) = NONE, ce(z_adv, y), (10, -0.5)
        weights = 3 * torch.sigmoid(slope * (margin(z_adv, y) + bias)) if run.epoch >= begin else 1.0
        of_target = natural_part + (weights * each).mean()
        run.update(of_target)
        return of_target, NONE

    return step


def count_correct(labels: Tensor, counts: Tensor, objective: Objective) -> Objective:
    """``objective``, counting on the way the samples that this iterate still has right."""

    def counting(z: Tensor) -> Tensor:
        for i, row in enumerate(z.tolist()):
            counts[i] += row.index(max(row)) == labels[i]
        return objective(z)

    return counting


def gairat(begin: int, dynamic: bool, count_truth: bool = False) -> Step:
    """GAIRAT; ``dynamic`` is DYNAT-Inner-GAIRAT: attack, loss and, unless ``count_truth``, kappa on l."""

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, g, x, y = run.t.eval(), run.g.train(), batch.images, batch.truth
        labels = g(x).argmax(1) if dynamic else y
        kappa = torch.zeros(len(x), dtype=torch.float64)
        objective = count_correct(y if count_truth else labels, kappa, lambda z: ce(z, labels))
        x_adv = climb(t, objective, x, anywhere(batch, 0.2), 0.2, 0.05)
        assert len(kappa.unique()) > 1
        t.train()
        weights = torch.ones(len(x), dtype=torch.float64)
        if run.epoch >= begin:
            weights = (1 + torch.tanh(-1 + (5 - kappa) * 5 / 5)) / 2
            weights = weights * len(weights) / weights.sum()
        of_target = (weights * ce(t(x_adv), labels)).mean()
        of_guide = ce(g(x), y).mean() if dynamic else NONE
        run.update(of_target + of_guide)
        return of_target, of_guide

    return step


def fat(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    return friendly(run, batch, batch.truth)


def dynat_fat(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    return friendly(run, batch, None)


def friendly(run: Published, batch: Batch, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """FAT: tau 0 before epoch 50, then 1; each sample on its own; without ``y`` against the guide's label."""
    assert batch.jitter is not None
    t, x, of_guide = run.t.eval(), batch.images, NONE
    if y is None:
        z_g = run.g.train()(x)
        y, of_guide = z_g.argmax(1), ce(z_g, batch.truth).mean()
    done = []
    for i, label in enumerate(y.tolist()):
        current, budget = anywhere(batch, 0.2)[i : i + 1], 0 if run.epoch < 50 else 1
        for k in range(10):
            point = current.clone().requires_grad_()
            z = t(point)
            if z.argmax() != label:
                if budget == 0:
                    break
                budget -= 1
            (gradient,) = torch.autograd.grad(ce(z, y[i : i + 1]).sum(), point)
            current = current + 0.05 * gradient.sign() + 0.001 * batch.jitter[k, i]
            current = torch.min(torch.max(current, x[i] - 0.2), x[i] + 0.2).clamp(0, 1)
        done.append(current)
    of_target = ce(t.train()(torch.cat(done)), y).mean()
    run.update(of_target + of_guide)
    return of_target, of_guide


def sat(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rice's loop with the threshold on the difficulty rising from 0 to 1 over the first 100 epochs."""
    t, x, y = run.t.train(), batch.images, batch.truth
    threshold, frozen = min(1.0, run.epoch / 100), torch.zeros(len(x), dtype=torch.bool)
    x_adv = anywhere(batch, 8 / 255)
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        z = t(x_adv)
        frozen = frozen | (margin(z, y) > threshold)
        (gradient,) = torch.autograd.grad(ce(z, y).mean(), x_adv)
        moved = x_adv.detach() + 2 / 255 * gradient.sign()
        moved = torch.min(torch.max(moved, x - 8 / 255), x + 8 / 255).clamp(0, 1)
        x_adv = torch.stack([x_adv[i].detach() if frozen[i] else moved[i] for i in range(len(x))])
    assert 0 < frozen.sum() < len(x)
    t(x_adv)
    of_target = ce(t(x_adv), y).mean()
    run.update(of_target)
    t(x)
    return of_target, NONE


def dynat_mail(dynamic: bool, mse: bool = False) -> Step:
    """MAIL's process against the guide's label; ``mse``: on LBGAT's distance, without the unread forward."""

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, g, x, y = run.t.eval(), run.g.train(), batch.images, batch.truth
        x_adv = climb(t, lambda z: ce(z, g(x).argmax(1) if dynamic else y), x, near(batch), 0.031, 0.007)
        t.train()
        z_adv, z_g = t(x_adv), g(x)
        if not mse:
            t(x)
        labels = z_g.argmax(1)
        each = ((z_adv - z_g) ** 2).sum(1) / 3 if mse else ce(z_adv, labels)
        weights = 3 * torch.sigmoid(10 * (margin(z_adv, labels) - 0.5)) if run.epoch >= 76 else 1.0
        of_target, of_guide = (weights * each).mean(), ce(z_g, y).mean()
        run.update(of_target + of_guide)
        return of_target, of_guide

    return step


def dynat_gairat(dynamic: bool) -> Step:
    """GAIRAT's process against the guide's label, which the target's cross entropy smooths by 0.2."""

    def step(run: Published, batch: Batch) -> tuple[Tensor, Tensor]:
        t, g, x, y = run.t.eval(), run.g.train(), batch.images, batch.truth
        kappa = torch.zeros(len(x), dtype=torch.float64)

        def objective(z: Tensor) -> Tensor:
            against = g(x).argmax(1) if dynamic else y
            return count_correct(against, kappa, lambda logits: ce(logits, against))(z)

        x_adv = climb(t, objective, x, anywhere(batch, 0.2), 0.2, 0.05)
        assert len(kappa.unique()) > 1
        t.train()
        z_adv, z_g = t(x_adv), g(x)
        t(x)
        weights = torch.ones(len(x), dtype=torch.float64)
        if run.epoch >= 70:
            weights = (1 + torch.tanh(-1 + 5 * (1 - 2 * kappa / 10))) / 2
            weights = weights / weights.mean()
        each = smoothed(z_adv, z_g.argmax(1), 0.2)
        of_target, of_guide = (weights * each).mean(), ce(z_g, y).mean()
        run.update(of_target + of_guide)
        return of_target, of_guide

    return step
