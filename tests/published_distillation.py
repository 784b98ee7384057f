"""Steps of adversarial distillation as the published codes take them, as in ``published_steps``.

The guide is in eval mode throughout and nothing of it is trained.
"""

import torch
from helpers import ce, kl
from published_steps import NONE, Objective, Published, anywhere, climb, near
from torch import Tensor, nn

from dynat.methods.batches import Batch

Pair = tuple[Tensor, Tensor]


def over_batch_and_ten_classes(each: Tensor) -> Tensor:
    """The mean that ARD, RSLAD and AdaAD take, of a sum over classes per sample."""
    return each.sum() / (len(each) * 10)


def unclamped(batch: Batch) -> Tensor:
    return batch.images + (2 * batch.start - 1) * 8 / 255


def climb_both(t: nn.Module, label: Objective, x: Tensor, start: Tensor) -> Tensor:
    """PGD on the KL from ``label(x_adv)``, differentiated through both."""
    x_adv = start
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(kl(label(x_adv), t(x_adv)).sum(), x_adv)
        x_adv = x_adv.detach() + 2 / 255 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
    return x_adv


def ard(run: Published, batch: Batch) -> Pair:
    t, g, x, y = run.t.train(), run.g.eval(), batch.images, batch.truth
    x_adv = climb(t, lambda z: ce(z, y), x, unclamped(batch), 8 / 255, 2 / 255)
    z_adv, z = t(x_adv), t(x)
    soft = over_batch_and_ten_classes(kl(g(x).detach() / 30, z_adv / 30))
    of_target = 1.0 * 30 * 30 * soft + 0.0 * ce(z, y).mean()
    run.update(of_target)
    return of_target, NONE


def rslad(run: Published, batch: Batch) -> Pair:
    t, g, x = run.t.eval(), run.g.eval(), batch.images
    label = g(x).detach()
    x_adv = climb(t, lambda z: kl(label, z), x, near(batch), 8 / 255, 2 / 255)
    t.train()
    z_adv, z = t(x_adv), t(x)
    of_target = 5 / 6 * over_batch_and_ten_classes(kl(label, z_adv))
    of_target = of_target + 1 / 6 * over_batch_and_ten_classes(kl(label, z))
    run.update(of_target)
    return of_target, NONE


def iad(run: Published, batch: Batch) -> Pair:
    """IAD-I from its epoch 60 on."""
    assert run.epoch >= 60
    t, g, x, y = run.t.train(), run.g.eval(), batch.images, batch.truth
    x_adv = climb(t, lambda z: ce(z, y), x, unclamped(batch), 8 / 255, 2 / 255)
    z_adv = t(x_adv)
    t(x_adv)
    of_guide = g(x_adv).detach().softmax(1)
    trust = torch.stack([of_guide[i, label] ** 0.1 for i, label in enumerate(y.tolist())])
    of_target = kl(g(x).detach(), z_adv).mean() + ((1 - trust) * kl(t(x), z_adv)).mean()
    t(x)
    run.update(of_target)
    return of_target, NONE


def adaad(run: Published, batch: Batch) -> Pair:
    t, g, x = run.t.eval(), run.g.eval(), batch.images
    x_adv = climb_both(t, g, x, near(batch))
    t.train()
    t(x)
    z_adv = t(x_adv)
    of_target = over_batch_and_ten_classes(kl(g(x_adv).detach(), z_adv))
    run.update(of_target)
    return of_target, NONE


def saad(run: Published, batch: Batch) -> Pair:
    t, g, x, y = run.t.eval(), run.g.eval(), batch.images, batch.truth
    slopes = []
    for i, label in enumerate(y.tolist()):
        point = x[i : i + 1].clone().requires_grad_()
        slopes.append(torch.autograd.grad(g(point)[0, label], point)[0])

    def linear(x_adv: Tensor) -> Tensor:
        rows = []
        for i, label in enumerate(y.tolist()):
            row = list(g(x)[i].detach())
            row[label] = row[label] + (slopes[i][0] * (x_adv[i] - x[i])).sum()
            rows.append(torch.stack(row))
        return torch.stack(rows)

    x_adv = climb_both(t, linear, x, near(batch))
    t.train()
    delta = x_adv - x
    z_plus, z_minus = t(x_adv), t(x - delta)
    t(x)
    g_plus, g_minus = g(x_adv).detach(), g(x - delta).detach()
    p = g_plus.softmax(1)
    entropy = -(p * p.log()).sum(1)
    weights = 5 * (entropy - entropy.min())
    gradient = (run.epoch + 1) / 200 * kl(g_plus - g_minus, z_plus - z_minus)
    of_target = (weights * (kl(g_plus, z_plus) + gradient)).mean()
    run.update(of_target)
    return of_target, NONE


def dynat_robust_guide(run: Published, batch: Batch) -> Pair:
    t, g, x = run.t.eval(), run.g.eval(), batch.images
    x_adv = climb(t, lambda z: kl(t(x), z), x, near(batch), 0.031, 0.007)
    t.train()
    of_target = ce(t(x_adv), g(x).argmax(1)).mean()
    t(x)
    run.update(of_target)
    return of_target, NONE


def soft_labels_of_a_trained_guide(run: Published, batch: Batch) -> Pair:
    """No published code: 0.3 tau² KL to the softened output of a trained guide, and 0.7 CE to the truth."""
    t, g, x, y = run.t.eval(), run.g.train(), batch.images, batch.truth
    z_g = g(x)
    x_adv = climb(t, lambda z: kl(z_g.detach(), z), x, anywhere(batch, 0.031), 0.031, 0.007)
    t.train()
    z, z_adv = t(x), t(x_adv)
    of_target = 0.3 * 4 * kl(z_g.detach() / 2, z_adv / 2).mean() + 0.7 * ce(z, y).mean()
    of_guide = ce(z_g, y).mean()
    run.update(of_target + of_guide)
    return of_target, of_guide
