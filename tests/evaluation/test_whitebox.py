"""The white-box attacks against a plain loop written from docs/methods.md 3.4."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynat.config.attack import Attack
from dynat.evaluation import whitebox
from dynat.evaluation.evidence import Evidence
from dynat.evaluation.whitebox import ATTACKS, evaluate, pgd, sample_noise
from dynat.methods import attacks
from dynat.networks.architectures import build

SPEC = Attack(epsilon=0.3, step=0.08, pgd=[3, 8], cw_steps=4, apgd_steps=5, batch=16, seed=1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = build("cnn", 4, 1, width=8, depth=2)
    network.train()
    network(torch.rand(64, 1, 8, 8))
    return network.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labels(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        labels = network(images / 255).argmax(1)
    labels[::7] = (labels[::7] + 1) % 4  # some are wrong from the start
    return labels


@pytest.fixture(scope="module")
def found(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Evidence]:
    return evaluate(network, images, labels, SPEC, ATTACKS)


def plain_attack(
    network: nn.Module, x: Tensor, y: Tensor, start: Tensor, steps: int, cw: bool, spec: Attack = SPEC
) -> Tensor:
    """One sample at a time: frozen as soon as it is misclassified, else a signed step and a clip."""
    verdicts = []
    for i in range(len(x)):
        clean, point, label = x[i : i + 1], start[i : i + 1].clone(), int(y[i])
        for _ in range(steps):
            point = point.detach().requires_grad_()
            logits = network(point)
            if logits.argmax() != label:
                break
            others = [logits[0, j] for j in range(logits.shape[1]) if j != label]
            loss = max(others) - logits[0, label] if cw else F.cross_entropy(logits, y[i : i + 1])
            step = spec.step * torch.autograd.grad(loss, point)[0].sign()
            point = (point + step).clamp(clean - spec.epsilon, clean + spec.epsilon).clamp(0, 1)
        clean_right = network(clean).argmax() == label
        verdicts.append(bool(clean_right and network(point.detach()).argmax() == label))
    return torch.tensor(verdicts)


@pytest.mark.parametrize(("name", "steps", "cw"), [("pgd3", 3, False), ("pgd8", 8, False), ("cw", 4, True)])
def test_verdicts_equal_a_plain_loop_over_samples(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    found: dict[str, Evidence],
    name: str,
    steps: int,
    cw: bool,
) -> None:
    expected = plain_attack(network, images / 255, labels, plain_start(images, SPEC), steps, cw)
    assert 0 < expected.sum() < 34  # six are wrong from the start
    assert torch.equal(found[name].robust, expected)


def plain_start(images: Tensor, spec: Attack) -> Tensor:
    x, noise = images / 255, sample_noise(images / 255, spec.seed, torch.arange(len(images)))
    return (x + (2 * noise - 1) * spec.epsilon).clamp(x - spec.epsilon, x + spec.epsilon).clamp(0, 1)


def test_fgsm_is_one_step_of_the_radius_from_the_same_random_start(
    network: nn.Module, images: Tensor, labels: Tensor
) -> None:
    wide = SPEC.model_copy(update={"epsilon": 0.6, "step": 0.01})
    found = evaluate(network, images, labels, wide, ["fgsm"])["fgsm"].robust
    once = wide.model_copy(update={"step": 0.6})
    expected = plain_attack(network, images / 255, labels, plain_start(images, wide), 1, False, once)
    assert 0 < expected.sum() < 34
    assert torch.equal(found, expected)


def test_every_broken_sample_has_a_misclassified_image_in_the_ball(
    network: nn.Module, images: Tensor, labels: Tensor, found: dict[str, Evidence]
) -> None:
    x = images.float() / 255
    clean = found["clean"].robust
    assert set(found) == {"clean", "fgsm", "pgd3", "pgd8", "cw", "apgd-ce"}
    assert len(found["pgd8"].indices) > 0
    for name in set(found) - {"clean"}:
        evidence = found[name]
        assert set(evidence.indices.tolist()) == set((clean & ~evidence.robust).nonzero().flatten().tolist())
        assert ((evidence.images - x[evidence.indices]).abs() <= SPEC.epsilon + 1e-6).all()
        assert ((evidence.images >= 0) & (evidence.images <= 1)).all()
        assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()


def test_more_steps_and_any_attack_only_break_more(found: dict[str, Evidence]) -> None:
    assert not (found["pgd8"].robust & ~found["pgd3"].robust).any()
    assert not (found["fgsm"].robust & ~found["clean"].robust).any()


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_no_verdict_depends_on_the_batch(
    network: nn.Module, images: Tensor, labels: Tensor, found: dict[str, Evidence], batch: int
) -> None:
    again = evaluate(network, images, labels, SPEC.model_copy(update={"batch": batch}), ATTACKS)
    for name, evidence in again.items():
        assert torch.equal(evidence.robust, found[name].robust)


def test_chosen_images_get_the_verdicts_and_the_images_that_they_get_among_all(
    network: nn.Module, images: Tensor, labels: Tensor, found: dict[str, Evidence]
) -> None:
    chosen = torch.tensor([3, 11, 12, 30])
    alone = evaluate(network, images[chosen], labels[chosen], SPEC, ("pgd",), indices=chosen)
    assert set(alone) == {"clean", "pgd3", "pgd8"}
    assert torch.equal(alone["pgd8"].robust, found["pgd8"].robust[chosen])
    there = torch.isin(found["pgd8"].indices, chosen)
    assert torch.equal(chosen[alone["pgd8"].indices], found["pgd8"].indices[there])
    assert torch.allclose(alone["pgd8"].images, found["pgd8"].images[there])


@pytest.fixture
def forwarded(network: nn.Module) -> Iterator[list[int]]:
    """Rows of every forward, of the network and of its folded copy, which inherits the hook."""
    rows: list[int] = []
    hook = network.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    yield rows
    hook.remove()


def test_no_forward_is_larger_than_the_batch(
    network: nn.Module, images: Tensor, labels: Tensor, forwarded: list[int]
) -> None:
    evaluate(network, images, labels, SPEC, ATTACKS)
    assert max(forwarded) == SPEC.batch < len(images)


def test_a_step_of_pgd_costs_one_forward_of_the_samples_still_robust(
    network: nn.Module, images: Tensor, forwarded: list[int]
) -> None:
    with torch.no_grad():
        labels = network(images / 255).argmax(1)
    forwarded.clear()
    spec = SPEC.model_copy(update={"epsilon": 1e-6, "pgd": [3, 8], "batch": 40})  # nothing breaks
    found = evaluate(network, images, labels, spec, ("pgd",))
    assert found["pgd8"].robust.all()
    assert forwarded == [40] * (1 + 8 + 1)  # clean, eight gradients, the last verdict
    forwarded.clear()
    broken = int((~evaluate(network, images, labels, SPEC, ("pgd",))["pgd8"].robust).sum())
    assert broken > 0
    assert sum(forwarded) < 40 * (1 + 8 + 1)


def test_a_success_that_only_the_crafting_network_sees_is_none(
    network: nn.Module, images: Tensor, labels: Tensor
) -> None:
    x, y = images[:7] / 255, labels[:7]
    right = network(x).argmax(1) == y
    assert right.any()
    blind = nn.Sequential(network, nn.Hardtanh(-1e-9, 1e-9)).eval()  # no gradient
    blind.register_forward_hook(lambda _, inputs, logits: logits.roll(1, 1))  # and wrong verdicts
    assert (blind(x).argmax(1) != y)[right].any()
    ((_, unmoved, robust),) = pgd(network, x, y, x, SPEC, [4], attacks.cross_entropy, blind)
    assert torch.equal(unmoved, x)
    assert torch.equal(robust, right)


def test_a_samples_start_depends_on_seed_and_index_alone() -> None:
    x = torch.zeros(3, 1, 2, 2)
    noise = sample_noise(x, 5, torch.tensor([4, 9, 2]))
    assert torch.equal(noise[1], sample_noise(x[:1], 5, torch.tensor([9]))[0])
    assert not torch.equal(noise[1], sample_noise(x[:1], 6, torch.tensor([9]))[0])


def test_apgd_attacks_a_sample_that_only_the_copy_misreads(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    found: dict[str, Evidence],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Misreading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -network(x)

    monkeypatch.setattr(whitebox, "crafting_copy", lambda *_: Misreading().eval())
    again = evaluate(network, images, labels, SPEC, ["apgd-ce"])
    assert 0 < found["apgd-ce"].robust.sum() < found["clean"].robust.sum()
    assert torch.equal(again["apgd-ce"].robust, found["apgd-ce"].robust)
