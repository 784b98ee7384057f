"""The lean Square attack against the package's, image by image."""

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from dynat.evaluation.square import Square
from dynat.networks.architectures import build


def network(channels: int) -> nn.Module:
    torch.manual_seed(2)
    network = build("cnn", 5, channels, width=8, depth=1)
    network.requires_grad_(False).eval()
    network[-1].bias -= network(images(channels)).mean(0)  # no class wins everywhere
    return network


def attack(predict: nn.Module, epsilon: float) -> SquareAttack:
    return SquareAttack(
        predict, norm="Linf", n_queries=400, eps=epsilon, p_init=0.8, seed=4, resc_schedule=False
    )


def images(channels: int) -> Tensor:
    return torch.rand(20, channels, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("epsilon", [0.01, 0.03])
def test_images_equal_the_packages_to_the_bit(channels: int, epsilon: float) -> None:
    predict, x = network(channels), images(channels)
    labels = predict(x).argmax(1)
    package = attack(predict, epsilon)
    expected = package.perturb(x, labels)
    found = Square(package).perturb(x, labels)
    robust = int((predict(found).argmax(1) == labels).sum())
    assert 0 < robust < 20  # some break on the way, some never
    assert torch.equal(found, expected)


def test_queries_are_counted_as_the_package_counts_them() -> None:
    predict, x = network(1), images(1)
    labels, package = predict(x).argmax(1), attack(predict, 0.03)
    counts = []
    for each in (package, Square(package)):
        each.init_hyperparam(x)
        torch.manual_seed(0)
        counts.append(each.attack_single_run(x, labels)[0])
    assert torch.equal(*counts)
