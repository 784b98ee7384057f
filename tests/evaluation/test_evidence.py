"""Evidence of parts and of several attacks, put together."""

import pytest
import torch
from torch import nn

from dynat.evaluation.evidence import Evidence, clean, join, predict


def evidence() -> Evidence:
    """Five samples of one pixel, of class 1 if it is bright; the fourth is wrong."""
    x = torch.tensor([0.9, 0.2, 0.8, 0.1, 0.7])[:, None, None, None]
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    network[1].weight.data, network[1].bias.data = torch.tensor([[-1.0], [1.0]]), torch.tensor([1.0, 0.0])
    return clean(network, x, torch.tensor([1, 0, 1, 1, 1]))


def test_broken_samples_are_added_in_the_order_of_the_samples_and_nothing_else_changes() -> None:
    before = evidence()
    assert before.robust.tolist() == [True, True, True, False, True]
    assert len(before.indices) == len(before.images) == 0
    pixels = torch.tensor([4.0, 1.0, 2.0])[:, None, None, None]
    first = before.with_broken(torch.tensor([4, 1]), pixels[:2])
    second = first.with_broken(torch.tensor([2]), pixels[2:])
    assert second.robust.tolist() == [True, False, False, False, False]
    assert second.indices.tolist() == second.images.flatten().tolist() == [1, 2, 4]
    assert first.robust.tolist() == [True, False, True, False, False]
    assert before.robust.all().item() is False


def test_joined_parts_are_the_evidence_of_the_whole() -> None:
    part = evidence().with_broken(torch.tensor([1]), torch.ones(1, 1, 1, 1))
    whole = join([part, part.counted_from(5)], torch.device("cpu"))
    assert whole.indices.tolist() == [1, 6]
    assert whole.robust.tolist() == part.robust.tolist() * 2
    assert whole.images.shape == (2, 1, 1, 1)


def test_a_network_in_training_mode_is_refused() -> None:
    network = nn.Linear(1, 2)
    with pytest.raises(AssertionError, match="eval mode"):
        predict(network, torch.zeros(1, 1))
