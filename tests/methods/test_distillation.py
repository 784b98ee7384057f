"""Soft labels of a guide, IAD's, SAAD's and IGDM's formulas in plain Python (docs/methods.md, section 17)."""

import copy
import math

import numpy as np
import pytest
import torch
from plain_losses import (
    ROWS,
    Array,
    assert_same,
    draw_labels,
    draw_logits,
    plain_ce,
    plain_kl,
    softmax,
)
from step_cases import CASES, draw, networks
from torch import Tensor

from dynat.config.guide import SoftLabels
from dynat.config.recipe import Objective, Weights
from dynat.methods import attacks, objectives
from dynat.methods.step import Engine, constants

TEMPERATURE, ALPHA, PROGRESS = 3.0, 0.4, 0.25


@pytest.mark.parametrize("at", ["natural", "adversarial"])
@pytest.mark.parametrize("weighted", [False, True])
def test_soft_labels_are_a_sum_of_tempered_kls_with_their_own_weights_and_give_the_guide_no_gradient(
    at: str, weighted: bool
) -> None:
    soft = SoftLabels(adversarial=0.7, natural=0.2, at=at, temperature=TEMPERATURE, gradient=1.5)
    weights = np.random.default_rng(3).random(ROWS) if weighted else np.ones(ROWS)
    guide, guide_adversarial, guide_mirrored = draw_logits(5, 3)

    def plain(natural: Array, adversarial: Array, mirrored: Array) -> float:
        total = 0.0
        for i in range(ROWS):
            label = guide[i] if at == "natural" else guide_adversarial[i]
            kl = TEMPERATURE**2 * plain_kl(label / TEMPERATURE, adversarial[i] / TEMPERATURE)
            total += ALPHA * 0.7 * weights[i] * kl
            total += 0.2 * TEMPERATURE**2 * plain_kl(guide[i] / TEMPERATURE, natural[i] / TEMPERATURE)
            changes = guide_adversarial[i] - guide_mirrored[i], adversarial[i] - mirrored[i]
            total += 1.5 * PROGRESS * weights[i] * plain_kl(*changes)
        return total / ROWS

    fixed = [torch.tensor(each, requires_grad=True) for each in (guide, guide_adversarial, guide_mirrored)]

    def code(natural: Tensor, adversarial: Tensor, mirrored: Tensor) -> Tensor:
        logits = objectives.Logits(natural, adversarial, fixed[0], fixed[1], mirrored, fixed[2])
        truth = torch.zeros(ROWS, dtype=torch.long)
        loss = objectives.target_loss(
            Objective(adversarial="none", soft=soft),
            logits,
            truth,
            truth,
            alpha=ALPHA,
            weights=torch.tensor(weights) if weighted else None,
            progress=PROGRESS,
        )
        assert torch.autograd.grad(loss, fixed, retain_graph=True, allow_unused=True) == (None,) * 3
        return loss

    assert_same(code, plain, draw_logits(4, 3))


def test_a_number_weighs_the_natural_cross_entropy_and_true_is_one() -> None:
    (natural,), truth = draw_logits(6, 1), draw_labels(6)
    labels, found = torch.tensor(truth), []
    for weight in (True, 0.25):
        objective = Objective(natural_ce=weight, adversarial="none")
        logits = objectives.Logits(torch.tensor(natural), torch.tensor(natural), None)
        found.append(objectives.target_loss(objective, logits, labels, labels).item())
    mean = sum(plain_ce(row, label) for row, label in zip(natural, truth, strict=True)) / ROWS
    assert found == pytest.approx([mean, mean / 4], rel=1e-12)


def weights_of(rule: Weights, guide: Array, labels: Array, epoch: int = 0) -> Tensor:
    logits = torch.tensor(guide, requires_grad=True)
    found = objectives.instance_weights(
        rule, epoch, logits.detach(), torch.tensor(labels), None, 10, guide=logits
    )
    assert found is not None
    assert not found.requires_grad
    return found


def test_iads_trust_is_a_power_of_the_guides_probability_from_its_epoch_on_and_one_before() -> None:
    (guide,), labels = draw_logits(7, 1), draw_labels(7)
    rule = Weights(rule="iad", begin=60, power=0.1)
    expected = [softmax(row)[label] ** 0.1 for row, label in zip(guide, labels, strict=True)]
    np.testing.assert_allclose(weights_of(rule, guide, labels, 60).numpy(), expected, rtol=1e-12)
    assert weights_of(rule, guide, labels, 59).tolist() == [1] * ROWS


def test_saads_weights_are_five_times_the_entropy_above_the_least_of_the_batch() -> None:
    (guide,), labels = draw_logits(8, 1), draw_labels(8)
    entropies = [-sum(p * math.log(p) for p in softmax(row)) for row in guide]
    expected = [5 * (each - min(entropies)) for each in entropies]
    found = weights_of(Weights(rule="saad", scale=5), guide, labels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert found.min() == 0


@pytest.mark.parametrize("terms", ["all", "kl"])
def test_trust_weighs_the_guides_term_where_asked_and_distrust_the_targets_own_kl(terms: str) -> None:
    rule, trust = Weights(rule="iad", terms=terms), torch.rand(ROWS, dtype=torch.float64)
    of_guide, of_kl = objectives.weights_of_terms(rule, trust)
    natural, adversarial, guide = draw_logits(9, 3)
    truth = torch.zeros(ROWS, dtype=torch.long)
    objective = Objective(adversarial="none", beta=2, soft=SoftLabels(adversarial=1))
    logits = objectives.Logits(*map(torch.tensor, (natural, adversarial, guide)))
    loss = objectives.target_loss(objective, logits, truth, truth, weights=of_guide, kl_weights=of_kl)
    expected = 0.0
    for i, a in enumerate(trust.tolist()):
        expected += (a if terms == "all" else 1) * plain_kl(guide[i], adversarial[i])
        expected += 2 * (1 - a) * plain_kl(natural[i], adversarial[i])
    assert loss.item() == pytest.approx(expected / ROWS, rel=1e-12)


def test_both_networks_climb_the_divergence_between_them() -> None:
    def plain(own: Array, partner: Array) -> float:
        return sum(plain_kl(partner[i], own[i]) for i in range(ROWS))

    assert_same(attacks.kl_between, plain, draw_logits(10, 2))


def test_saads_partner_moves_the_true_class_alone_and_along_its_gradient() -> None:
    _, guide = networks()
    guide.eval()
    batch = draw(CASES["saad"][0], 20)
    images, labels = batch.images, batch.truth
    partner = attacks.linear_in_truth(guide, images, labels)
    small = 1e-6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = guide(images), guide(images + small)
    moved, own = partner(images + small) - before, torch.nn.functional.one_hot(labels, 3).bool()
    assert (moved[~own] == 0).all()
    torch.testing.assert_close(moved[own], (after - before)[own], rtol=1e-3, atol=1e-12)
    assert torch.equal(partner(images), before)


@pytest.mark.parametrize("name", ["ard", "rslad", "iad", "adaad", "saad", "dynat_robust_guide"])
def test_a_frozen_guide_stays_as_it_is_and_is_in_no_optimiser(name: str) -> None:
    target, guide = networks()
    before = copy.deepcopy(guide.state_dict())
    choice = CASES[name][0]
    engine = Engine(choice, target, guide)
    engine.set_epoch(choice.schedule.epochs - 1)
    engine.step(draw(choice, 20))
    assert [*engine.networks] == ["target"]
    assert len(engine.optimizer.param_groups[0]["params"]) == len(list(target.parameters()))
    assert all(torch.equal(before[key], value) for key, value in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_igdms_term_grows_with_the_epochs_to_its_whole_weight_in_the_last() -> None:
    choice = CASES["saad"][0]

    shares = [constants(choice, epoch).progress for epoch in (0, 99, 199)]
    assert shares == pytest.approx([1 / 200, 0.5, 1])
