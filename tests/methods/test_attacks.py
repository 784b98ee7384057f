"""Attacks stay in the ball, climb as a loop over single samples does, stop and count the right samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Tiny, ce, kl, random_images, random_labels, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynat.config.attack import Attack
from dynat.config.recipe import Stop
from dynat.evaluation.whitebox import pgd
from dynat.methods import attacks
from dynat.methods.inner import early_stop

EPSILON, STEP, STEPS = 0.3, 0.08, 6
COUNT = 12


class Plain(NamedTuple):
    """What the plain attack of one sample found."""

    image: Tensor
    correct: int  # iterates before a step, the start included, that are classified as the label
    steps: int  # steps taken


def plain_attack(
    network: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor], Tensor],
    image: Tensor,
    start: Tensor,
    label: int,
    *,
    jitter: Tensor | None = None,
    threshold: float | None = None,
    budget: int = 0,
) -> Plain:
    """Ascend from ``start`` as methods.md 7, 8 and 10 describe it, for one sample.

    With a ``threshold`` on max_{j != label} p_j - p_label, the sample is emitted as it is once it exceeds
    it with no budget left; with budget left, one unit is used and it goes on.
    """
    current, correct = start, 0
    for index in range(STEPS):
        point = current.clone().requires_grad_()
        logits = network(point[None])
        p = logits[0].softmax(0).tolist()
        correct += p.index(max(p)) == label
        if threshold is not None and max(p[j] for j in range(len(p)) if j != label) - p[label] > threshold:
            if budget == 0:
                return Plain(current, correct, index)
            budget -= 1
        (gradient,) = torch.autograd.grad(objective(logits).sum(), point)
        current = current + STEP * gradient.sign()
        if jitter is not None:
            current = current + jitter[index]
        current = torch.min(torch.max(current, image - EPSILON), image + EPSILON).clamp(0, 1)
    return Plain(current, correct, STEPS)


class Scene(NamedTuple):
    network: Tiny
    images: Tensor
    labels: Tensor
    start: Tensor


def scene(seed: int) -> Scene:
    network, images = Tiny(seed).eval(), random_images(seed, COUNT)
    noise = torch.rand(images.shape, generator=stream(seed + 1), dtype=torch.float64)
    labels = network(images).argmax(1)
    labels[0] = (labels[0] + 1) % 3  # wrong from the start
    return Scene(network, images, labels, (images + (2 * noise - 1) * EPSILON / 3).clamp(0, 1))


def ascend(world: Scene, loss: attacks.Loss, **more: Any) -> Tensor:
    return attacks.ascend(
        world.network,
        loss,
        world.images,
        world.start,
        epsilon=EPSILON,
        step=STEP,
        steps=STEPS,
        **more,
    )


def ce_to(label: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: ce(logits, torch.tensor([label]))


def alone(world: Scene, i: int, **rule: Any) -> Plain:
    """The plain attack on the cross entropy of sample ``i``."""
    label = int(world.labels[i])
    return plain_attack(world.network, ce_to(label), world.images[i], world.start[i], label, **rule)


def assert_same_images(found: Tensor, ones: list[Plain]) -> None:
    assert torch.allclose(found, torch.stack([one.image for one in ones]), rtol=0, atol=1e-12)


def margin(logits: Tensor, label: int) -> Tensor:
    return max(logits[0, j] for j in range(3) if j != label) - logits[0, label]


@pytest.mark.parametrize("name", ["ce", "kl", "margin"])
def test_batched_attack_equals_a_loop_over_single_samples(name: str) -> None:
    world = scene(3)
    natural = world.network(world.images).detach()
    loss = {
        "ce": attacks.cross_entropy(world.labels),
        "kl": attacks.kl_from(natural),
        "margin": attacks.margin(world.labels),
    }[name]
    found = ascend(world, loss)
    ones = []
    for i, label in enumerate(world.labels.tolist()):
        objective = {
            "ce": ce_to(label),
            "kl": lambda z, i=i: kl(natural[i : i + 1], z),
            "margin": lambda z, label=label: margin(z, label),
        }[name]
        ones.append(plain_attack(world.network, objective, world.images[i], world.start[i], label))
    assert_same_images(found, ones)


@pytest.mark.parametrize("offset", [-9.0, 0.0, 9.0])
def test_margin_is_the_best_rival_minus_the_label_for_scores_of_any_sign(offset: float) -> None:
    scores = offset + torch.randn(20, 3, generator=stream(5), dtype=torch.float64)
    labels = random_labels(5, 20)
    expected = [
        max(row[j] for j in range(3) if j != y) - row[y]
        for row, y in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    assert attacks.margins(scores, labels).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_fat_freezes_misclassified_samples_after_tau_more_steps(tau: int) -> None:
    world = scene(4)
    jitter = 0.01 * torch.randn((STEPS, *world.images.shape), generator=stream(9), dtype=torch.float64)
    rule = attacks.EarlyStop(world.labels, 0.0, tau)
    found = ascend(world, attacks.cross_entropy(world.labels), moving=rule, jitter=jitter)
    ones = [alone(world, i, jitter=jitter[:, i], threshold=0.0, budget=tau) for i in range(COUNT)]
    assert_same_images(found, ones)
    assert {tau, STEPS} < {
        one.steps for one in ones
    }  # stopped at the start, under way and never: all of them are covered


def test_sat_freezes_samples_whose_difficulty_exceeds_the_threshold() -> None:
    world, thresholds = scene(3), (0.0, 0.2, 0.4)
    moved = []
    for threshold in thresholds:
        rule = attacks.EarlyStop(world.labels, threshold, 0)
        found = ascend(world, attacks.cross_entropy(world.labels), moving=rule)
        ones = [alone(world, i, threshold=threshold) for i in range(COUNT)]
        assert_same_images(found, ones)
        moved.append(sum(one.steps for one in ones))
    assert moved[0] < moved[1] < moved[2]


def test_early_stop_follows_fats_tau_and_sats_ramp_over_the_epochs() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    fat = Stop(budget={0: 0, 50: 1, 90: 2})
    for epoch, tau in {0: 0, 49: 0, 50: 1, 89: 1, 90: 2, 119: 2}.items():
        rule = early_stop(fat, labels, epoch)
        assert rule is not None
        assert (rule.threshold, rule.left.tolist()) == (0.0, [tau, tau])
    sat = Stop(threshold=(0.2, 1.0), ramp_until=40)
    for epoch, threshold in {0: 0.2, 10: 0.4, 40: 1.0, 99: 1.0}.items():
        rule = early_stop(sat, labels, epoch)
        assert rule is not None
        assert rule.threshold == pytest.approx(threshold)
        assert rule.left.tolist() == [0, 0]


def test_kappa_counts_correct_iterates_from_the_start_without_the_final_point() -> None:
    world = scene(4)
    counter = attacks.CorrectSteps(world.labels)
    found = ascend(world, attacks.cross_entropy(world.labels), moving=counter)
    ones = [alone(world, i) for i in range(COUNT)]
    assert_same_images(found, ones)  # counting does not change the attack
    counts = [one.correct for one in ones]
    assert counter.kappa.tolist() == counts
    assert {0, STEPS} < set(counts)  # also something in between


# ------------------------------------------------------------------------------- properties

LOSSES: dict[str, Callable[[Tensor, Tensor], attacks.Loss]] = {
    "ce": lambda natural, labels: attacks.cross_entropy(labels),
    "kl": lambda natural, labels: attacks.kl_from(natural),
    "margin": lambda natural, labels: attacks.margin(labels),
}
NETWORK = Tiny(3).eval()
unit = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def assert_in_ball(found: Tensor, images: Tensor, epsilon: float) -> None:
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - images).abs().max() <= epsilon + 2 * torch.finfo(found.dtype).eps
    assert not found.requires_grad


@given(
    name=st.sampled_from(sorted(LOSSES)),
    epsilon=unit,
    step=st.floats(0, 3),
    steps=st.integers(0, 4),
    start=st.sampled_from(["uniform", "gaussian", "anywhere"]),
    scale=st.floats(0, 5),
    precision=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
@settings(max_examples=60, deadline=None)
def test_every_attack_stays_in_the_ball_and_in_the_unit_cube(
    name: str,
    epsilon: float,
    step: float,
    steps: int,
    start: str,
    scale: float,
    precision: torch.dtype,
    seed: int,
) -> None:
    images = random_images(seed, 3).to(precision)
    labels = random_labels(seed, 3)
    if start == "uniform":
        noise = torch.rand(images.shape, generator=stream(seed), dtype=precision)
        first = attacks.uniform_start(images, epsilon, noise)
        assert_in_ball(first, images, epsilon)
    else:
        noise = torch.randn(images.shape, generator=stream(seed), dtype=precision)
        first = attacks.gaussian_start(images, scale, noise) if start == "gaussian" else 10 * noise
    jitter = scale * torch.randn((steps, *images.shape), generator=stream(seed), dtype=precision)

    def forward(x: Tensor) -> Tensor:
        return NETWORK(x.double())

    natural = forward(images).detach()
    for moving in (None, attacks.EarlyStop(labels, 0.0, 1)):
        found = attacks.ascend(
            forward,
            LOSSES[name](natural, labels),
            images,
            first,
            epsilon=epsilon,
            step=step,
            steps=steps,
            moving=moving,
            jitter=jitter,
        )
        assert found.dtype == precision
        assert_in_ball(found, images, epsilon)
        if steps == 0:
            nearest = torch.min(torch.max(first, images - epsilon), images + epsilon).clamp(0, 1)
            assert torch.equal(found, nearest)
        if epsilon == 0:
            assert torch.equal(found, images)


def test_uniform_start_reaches_both_bounds_and_gaussian_start_is_not_clamped() -> None:
    images = torch.full((1, 1, 2, 2), 0.5)
    corners = attacks.uniform_start(images, 0.25, torch.tensor([0.0, 0.5, 0.75, 1.0]).view(1, 1, 2, 2))
    assert corners.flatten().tolist() == [0.25, 0.5, 0.625, 0.75]
    outside = attacks.gaussian_start(torch.ones(1, 1, 1, 1), 0.001, torch.full((1, 1, 1, 1), 3.0))
    assert outside.item() == pytest.approx(1.003)


@given(name=st.sampled_from(sorted(LOSSES)), epsilon=unit, step=unit, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_more_steps_never_lower_the_loss_of_the_best_iterate(
    name: str, epsilon: float, step: float, seed: int
) -> None:
    """A longer attack visits all iterates of a shorter one first, so that its best is at least as good."""
    images, labels = random_images(seed, 3), random_labels(seed, 3)
    loss = LOSSES[name](NETWORK(images).detach(), labels)
    noise = torch.rand(images.shape, generator=stream(seed), dtype=torch.float64)
    start = attacks.uniform_start(images, epsilon, noise)
    best = -torch.inf
    for steps in range(5):
        visited: list[Tensor] = []

        def forward(x: Tensor, visited: list[Tensor] = visited) -> Tensor:
            visited.append(x.detach())
            return NETWORK(x)

        final = attacks.ascend(forward, loss, images, start, epsilon=epsilon, step=step, steps=steps)
        reached = max(loss(NETWORK(x)).item() for x in [*visited, final])
        assert len(visited) == steps
        assert reached >= best
        best = reached


def test_evaluation_pgd_equals_a_loop_that_stops_each_sample_where_it_breaks() -> None:
    world = scene(4)
    spec = Attack(epsilon=EPSILON, step=STEP, pgd=[STEPS])
    ((_, found, _),) = pgd(
        world.network, world.images, world.labels, world.start, spec, [STEPS], attacks.cross_entropy
    )
    assert_same_images(found, [alone(world, i, threshold=0.0) for i in range(COUNT)])


@given(epsilon=unit, step=unit, checkpoints=st.sets(st.integers(1, 5), min_size=1), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_evaluation_pgd_stays_in_the_ball_and_never_mends_what_it_broke(
    epsilon: float, step: float, checkpoints: set[int], seed: int
) -> None:
    images, labels = random_images(seed, 5), random_labels(seed, 5)
    values = {"epsilon": epsilon, "step": step}  # 0 too, which params.yaml refuses
    spec = Attack(epsilon=1, step=1, pgd=sorted(checkpoints)).model_copy(update=values)
    noise = torch.rand(images.shape, generator=stream(seed), dtype=torch.float64)
    start = attacks.uniform_start(images, epsilon, noise)
    before = NETWORK(start).argmax(1) == labels
    broken = start[~before]
    for steps, found, robust in pgd(
        NETWORK, images, labels, start, spec, sorted(checkpoints), attacks.cross_entropy
    ):
        assert_in_ball(found, images, epsilon)
        assert torch.equal(robust, NETWORK(found).argmax(1) == labels)  # the image proves its verdict
        assert not (robust & ~before).any()
        assert torch.equal(found[~before], broken)  # frozen where it broke
        single = pgd(NETWORK, images, labels, start, spec, [steps], attacks.cross_entropy)
        assert torch.equal(single[0][1], found)
        before, broken = robust, found[~robust]


def test_losses_of_an_attack_are_sums_over_its_samples() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    natural, labels = logits.flip(0) / 2, torch.tensor([2, 0])
    assert attacks.cross_entropy(labels)(logits).item() == pytest.approx(ce(logits, labels).sum().item())
    assert attacks.kl_from(natural)(logits).item() == pytest.approx(kl(natural, logits).sum().item())


def test_a_difficulty_at_the_threshold_still_moves_and_one_above_stops() -> None:
    logits, labels = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2, dtype=torch.long)
    assert attacks.EarlyStop(labels, 0.0, 0)(logits).tolist() == [True, False]
