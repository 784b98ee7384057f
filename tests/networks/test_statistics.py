"""The closed form leaves the running statistics that really running the published forwards would leave."""

import copy
import math

import pytest
import torch
from helpers import Tiny, random_images, random_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynat.methods import attacks
from dynat.networks.statistics import effective_momenta, statistics

BATCHES = {"natural": random_images(1), "adversarial": random_images(2)}
NAMES = sorted(BATCHES)


def warm(seed: int) -> Tiny:
    """A network whose running statistics have seen something."""
    network = Tiny(seed).train()
    with torch.no_grad():
        network(random_images(3))
    return network


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers()}


def assert_same_buffers(ours: nn.Module, published: nn.Module) -> None:
    for (name, a), (_, b) in zip(ours.named_buffers(), published.named_buffers(), strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14), name


@given(
    sequence=st.lists(st.sampled_from(NAMES), max_size=15),
    order=st.permutations(NAMES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_one_forward_per_batch_leaves_the_statistics_of_any_published_sequence(
    sequence: list[str], order: list[str], seed: int
) -> None:
    ours, published = warm(seed), warm(seed)
    momenta = effective_momenta(sequence, order)
    assert all(0 <= momentum <= 1 for momentum in momenta)
    for name, momentum in zip(order, momenta, strict=True):
        with statistics(ours, momentum, sequence.count(name)):
            ours(BATCHES[name])
    for name in sequence:
        published(BATCHES[name])
    assert_same_buffers(ours, published)
    assert ours.bn1.num_batches_tracked == 1 + len(sequence)
    assert ours.sub_block1[1].num_batches_tracked == 0  # never called, never counted


def test_guide_after_eleven_forwards_is_0_314_old_and_0_686_new() -> None:
    """The numbers of methods.md 3.1, with the unbiased variance."""
    (momentum,) = effective_momenta(["natural"] * 11, ["natural"])
    assert momentum == pytest.approx(1 - 0.9**11)
    guide, first = warm(0), {}
    guide.conv1.register_forward_hook(lambda module, inputs, output: first.update(out=output))
    before = buffers(guide)
    with statistics(guide, momentum, 11):
        guide(BATCHES["natural"])
    channels = first["out"].transpose(0, 1).flatten(1)
    for key, batch in (("running_mean", channels.mean(1)), ("running_var", channels.var(1))):
        expected = 0.9**11 * before[f"bn1.{key}"] + (1 - 0.9**11) * batch
        assert torch.allclose(getattr(guide.bn1, key), expected, rtol=1e-12)
    assert math.isclose(0.9**11, 0.314, abs_tol=5e-4)
    assert guide.bn1.num_batches_tracked == before["bn1.num_batches_tracked"] + 11


def test_target_of_dynat_keeps_0_81_and_takes_0_09_adversarial_and_0_10_natural() -> None:
    momenta = effective_momenta(["adversarial", "natural"], ["natural", "adversarial"])
    first, second = momenta
    assert (1 - first) * (1 - second) == pytest.approx(0.81)
    assert first * (1 - second) == pytest.approx(0.10)
    assert second == pytest.approx(0.09)


def test_layers_keep_their_own_momentum_and_logits_do_not_change() -> None:
    network = warm(0)
    network.bn2.momentum = 0.3
    plain = copy.deepcopy(network)(BATCHES["natural"])
    with statistics(network, 0.686, 11):
        assert torch.equal(network(BATCHES["natural"]), plain)
    with pytest.raises(InterruptedError), statistics(network, 0.5, 1):
        raise InterruptedError
    assert (network.bn1.momentum, network.bn2.momentum) == (0.1, 0.3)


def test_attack_in_eval_mode_and_forwards_without_updates_move_no_statistic() -> None:
    network = warm(0)
    before = buffers(network)
    attacks.ascend(
        network.eval(),
        attacks.cross_entropy(random_labels(1)),
        BATCHES["natural"],
        BATCHES["natural"],
        epsilon=0.1,
        step=0.05,
        steps=3,
    )
    network.train()
    with statistics(network, 0.0, 0):  # AWP's proxy has buffers of its own
        network(BATCHES["natural"])
        network(BATCHES["adversarial"])
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
