"""Every loss and weight equals its formula (methods.md 3-12) in plain Python, and so does its gradient."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import (
    CLASSES,
    ROWS,
    Array,
    assert_same,
    draw_labels,
    draw_logits,
    plain_ce,
    plain_kl,
    softmax,
)
from torch import Tensor

from dynat.config.recipe import Objective, Weights
from dynat.methods import objectives


def plain_bce(row: Array, label: int) -> float:
    p = softmax(row)
    rival = max(p[k] for k in range(len(p)) if k != label)
    return -math.log(p[label]) - math.log(1.0001 - rival + 1e-12)


def plain_mart_kl(natural: Array, adversarial: Array, label: int) -> float:
    p, q = softmax(natural), softmax(adversarial)
    divergence = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True))
    return divergence * (1.0000001 - p[label])


def plain_mse(adversarial: Array, guide: Array) -> float:
    return sum((a - g) ** 2 for a, g in zip(adversarial, guide, strict=True)) / len(guide)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["ce", "smoothed_ce", "bce", "kl", "mart_kl"])
def test_each_sample_loss_and_gradient_is_its_formula(name: str, seed: int) -> None:
    y = draw_labels(seed)
    t = torch.tensor(y)
    code, plain, number = {
        "ce": (lambda a: objectives.smoothed_ce(a, t), lambda a, i: plain_ce(a[i], y[i]), 1),
        "smoothed_ce": (
            lambda a: objectives.smoothed_ce(a, t, 0.2),
            lambda a, i: plain_ce(a[i], y[i], 0.2),
            1,
        ),
        "bce": (lambda a: objectives.boosted_ce(a, t), lambda a, i: plain_bce(a[i], y[i]), 1),
        "kl": (objectives.divergence, lambda n, a, i: plain_kl(n[i], a[i]), 2),
        "mart_kl": (
            lambda n, a: objectives.mart_divergence(n, a, t),
            lambda n, a, i: plain_mart_kl(n[i], a[i], y[i]),
            2,
        ),
    }[name]
    for row in range(ROWS):
        assert_same(
            lambda *z, row=row: code(*z)[row], lambda *z, row=row: plain(*z, row), draw_logits(seed, number)
        )


COMBINATIONS = [
    (natural_ce, adversarial, beta, kl, weighted)
    for natural_ce, adversarial, (beta, kl), weighted in itertools.product(
        (False, True),
        ("none", "ce", "bce", "mse"),
        ((0.0, "plain"), (2.5, "plain"), (5.0, "mart")),
        (False, True),
    )
    if natural_ce or adversarial != "none" or beta
]


@pytest.mark.parametrize(("natural_ce", "adversarial", "beta", "kl", "weighted"), COMBINATIONS)
def test_target_loss_is_the_sum_of_its_terms_for_every_combination(
    natural_ce: bool, adversarial: str, beta: float, kl: str, weighted: bool
) -> None:
    """alpha on the adversarial term alone; weights on it and on the KL; smoothing on both cross entropies;
    the guide gets a gradient from the MSE alone."""
    alpha, smoothing = 0.3, 0.2
    truth, labels = draw_labels(1), draw_labels(2)
    weights = np.random.default_rng(3).random(ROWS) * 3 if weighted else np.ones(ROWS)

    def plain(natural: Array, adv: Array, guide: Array) -> float:
        total = 0.0
        for i in range(ROWS):
            if natural_ce:
                total += plain_ce(natural[i], truth[i], smoothing)
            if adversarial == "ce":
                total += alpha * weights[i] * plain_ce(adv[i], labels[i], smoothing)
            if adversarial == "bce":
                total += alpha * weights[i] * plain_bce(adv[i], labels[i])
            if adversarial == "mse":
                total += alpha * weights[i] * plain_mse(adv[i], guide[i])
            if kl == "plain":
                total += beta * weights[i] * plain_kl(natural[i], adv[i])
            else:
                total += beta * weights[i] * plain_mart_kl(natural[i], adv[i], labels[i])
        return total / ROWS

    def code(natural: Tensor, adv: Tensor, guide: Tensor) -> Tensor:
        return objectives.target_loss(
            Objective(natural_ce=natural_ce, adversarial=adversarial, beta=beta, kl=kl),
            objectives.Logits(natural, adv, guide),
            torch.tensor(truth),
            torch.tensor(labels),
            alpha=alpha,
            weights=torch.tensor(weights) if weighted else None,
            smoothing=smoothing,
        )

    assert_same(code, plain, draw_logits(4, 3))


def test_losses_and_gradients_stay_finite_when_probabilities_saturate() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        natural = (300 * torch.eye(CLASSES)[:ROWS]).to(dtype).requires_grad_()
        adversarial = (-300 * torch.eye(CLASSES)[:ROWS]).to(dtype).requires_grad_()
        y = torch.arange(ROWS)
        for loss in (
            objectives.smoothed_ce(adversarial, y, 0.1),
            objectives.boosted_ce(adversarial, y),
            objectives.boosted_ce(natural, (y + 1) % CLASSES),
            objectives.divergence(natural, adversarial),
            objectives.mart_divergence(natural, adversarial, y),
        ):
            assert loss.dtype == torch.float32  # not summed in half precision
            gradients = torch.autograd.grad(loss.sum(), [natural, adversarial], allow_unused=True)
            assert loss.isfinite().all()
            assert all(g is None or g.isfinite().all() for g in gradients)


def weights_of(rule: Weights, adversarial: Tensor, labels: Tensor, kappa: Tensor, epoch: int = 0) -> Tensor:
    found = objectives.instance_weights(
        rule, epoch, kappa=kappa, steps=10, adversarial=adversarial, labels=labels
    )
    assert found is not None
    return found


@given(st.lists(st.integers(0, 10), min_size=1, max_size=20), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_gairat_weights_are_the_formula_with_mean_one(counts: list[int], shift: float) -> None:
    logits = torch.zeros(len(counts), CLASSES, dtype=torch.float64)
    labels = torch.zeros(len(counts), dtype=torch.long)
    found = weights_of(Weights(rule="gairat", shift=shift), logits, labels, torch.tensor(counts))
    raw = [(1 + math.tanh(shift + 5 * (1 - 2 * k / 10))) / 2 for k in counts]
    np.testing.assert_allclose(found.numpy(), [w * len(raw) / sum(raw) for w in raw], rtol=1e-7)
    assert found.mean().item() == pytest.approx(1, rel=1e-12)


def test_gairat_of_an_odd_number_of_steps_has_the_published_exponent() -> None:
    kappa, labels = torch.arange(6), torch.zeros(6, dtype=torch.long)
    logits = torch.zeros(6, CLASSES, dtype=torch.float64)
    found = objectives.instance_weights(Weights(rule="gairat"), 0, logits, labels, kappa, 5)
    assert found is not None
    raw = np.array([(1 + math.tanh(-1 + (int(5 / 2) - k) * 5 / int(5 / 2))) / 2 for k in range(6)])
    np.testing.assert_allclose(found.numpy(), raw / raw.mean(), rtol=1e-9)


def test_gairat_with_the_published_constants_is_one_plus_tanh_of_four_minus_kappa() -> None:
    kappa = torch.arange(11)
    labels = torch.zeros(11, dtype=torch.long)
    found = weights_of(Weights(rule="gairat"), torch.zeros(11, CLASSES, dtype=torch.float64), labels, kappa)
    raw = np.array([(1 + math.tanh(4 - k)) / 2 for k in range(11)])
    np.testing.assert_allclose(found.numpy(), raw / raw.mean(), rtol=1e-9)
    assert (found.diff() < 0).all()  # the harder to attack, the lighter


def test_gairat_weights_of_a_batch_that_no_step_breaks_are_all_one_in_float32() -> None:
    kappa, labels = torch.full((4,), 10), torch.zeros(4, dtype=torch.long)
    found = weights_of(Weights(rule="gairat", shift=-8.0), torch.zeros(4, CLASSES), labels, kappa)
    np.testing.assert_allclose(found.numpy(), 1, rtol=1e-6)


@pytest.mark.parametrize(("slope", "bias"), [(10.0, -0.5), (2.0, 0.0)])
def test_mail_weights_are_three_sigmoids_of_the_margin(slope: float, bias: float) -> None:
    (logits,), labels = draw_logits(7, 1), draw_labels(7)
    expected = []
    for row, label in zip(logits, labels, strict=True):
        p = softmax(row)
        margin = max(p[k] for k in range(CLASSES) if k != label) - p[label]
        expected.append(3 / (1 + math.exp(-slope * (margin + bias))))
    rule = Weights(rule="mail", slope=slope, bias=bias)
    found = weights_of(rule, torch.tensor(logits), torch.tensor(labels), torch.zeros(ROWS))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("rule", ["gairat", "mail"])
def test_weights_begin_at_their_epoch_and_carry_no_gradient(rule: str) -> None:
    logits = torch.tensor(draw_logits(8, 1)[0], requires_grad=True)
    labels, kappa = torch.tensor(draw_labels(8)), torch.arange(ROWS)
    spec = Weights(rule=rule, begin=60)
    for epoch in (0, 59):
        assert (
            objectives.instance_weights(spec, epoch, kappa=kappa, steps=10, adversarial=logits, labels=labels)
            is None
        )
    for epoch in (60, 61):
        found = weights_of(spec, logits, labels, kappa, epoch)
        assert not found.requires_grad
        assert found.std() > 0


def test_the_adversarial_term_counts_whole_unless_alpha_says_otherwise() -> None:
    adversarial, labels = torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([1])
    logits = objectives.Logits(None, adversarial, None)
    plain = objectives.target_loss(Objective(), logits, labels, labels)
    assert plain.item() == pytest.approx(math.log(1 + math.exp(3)), rel=1e-12)
    half = objectives.target_loss(Objective(), logits, labels, labels, alpha=0.5)
    assert half.item() == pytest.approx(plain.item() / 2, rel=1e-12)
