"""AutoAttack in pieces: the same as the package in one go, resumable, and with its warnings kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack as Package
from torch import Tensor, nn

from dynat.config.params import AutoAttack
from dynat.evaluation.autoattack import STANDARD, _package, _run_piece, run
from dynat.evaluation.pieces import Pieces, StoppedError
from dynat.networks.architectures import build

pytestmark = pytest.mark.slow
IMAGES = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def small(batch: int, workers: int = 1) -> AutoAttack:
    return AutoAttack(epsilon=0.05, n=[8], batch=batch, workers=workers, seed=3)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(1)
    network = build("cnn", 10, 1, width=8, depth=1)
    network.train()
    network(torch.rand(64, 1, 8, 8))
    for parameter in network.requires_grad_(False).parameters():
        parameter.mul_(1.5)
    return network.eval()


@pytest.fixture(scope="module")
def labels(network: nn.Module) -> Tensor:
    return network(IMAGES / 255).argmax(1)


def pieces(kept: dict[str, Any], stopped: Callable[[], bool] = lambda: False) -> Pieces:
    return Pieces(kept.get, kept.__setitem__, lambda _: None, stopped)


def attack(network: nn.Module, labels: Tensor, spec: AutoAttack, kept: dict[str, Any]) -> Any:
    """Run with pieces kept in ``kept``; in worker processes they are lost, and made again here."""
    return run(network, IMAGES, labels, spec, pieces(kept))


FORWARDED: list[int] = []  # rows of every forward of the run in two chunks


@pytest.fixture(scope="module")
def in_two_chunks(network: nn.Module, labels: Tensor) -> Any:
    hook = network.register_forward_hook(lambda _, inputs, output: FORWARDED.append(len(output)))
    found = attack(network, labels, small(4), {})
    hook.remove()
    return found


def test_one_chunk_gives_the_verdicts_of_the_package(network: nn.Module, labels: Tensor) -> None:
    found, _ = attack(network, labels, small(8), {})
    package = Package(network, eps=0.05, seed=3, version="standard")
    _, predicted = package.run_standard_evaluation(IMAGES / 255, labels, batch_size=8)
    assert torch.equal(found["square"].robust, predicted == labels)


def test_standard_is_the_four_attacks_with_their_published_counts() -> None:
    package = Package(nn.Identity(), eps=0.05, seed=0, version="standard")
    assert tuple(package.attacks_to_run) == STANDARD == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert (package.apgd.n_iter, package.apgd.n_restarts) == (100, 1)
    assert (package.apgd_targeted.n_iter, package.apgd_targeted.n_target_classes) == (100, 9)
    assert (package.fab.n_iter, package.fab.n_target_classes, package.square.n_queries) == (100, 9, 5000)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_own_data_may_have_fewer_classes_than_the_attack_has_targets(classes: int) -> None:
    torch.manual_seed(0)
    network = build("cnn", classes, 1, width=8, depth=1).eval()
    truth = network(IMAGES / 255).argmax(1)
    found, warnings = run(network, IMAGES, truth, small(8), pieces({}))
    assert found["clean"].robust.all()
    evidence = found["square"]
    assert (network(evidence.images).argmax(1) != truth[evidence.indices]).all()
    assert any("apgd-t needs four classes" in warning for warning in warnings) == (classes < 4)


def test_finished_pieces_are_not_run_again_and_change_nothing(
    network: nn.Module, labels: Tensor, in_two_chunks: Any
) -> None:
    kept: dict[str, Any] = {}
    attack(network, labels, small(4), kept)
    assert len(kept) == 2 * len(STANDARD)
    del kept["fab-t 4-8"], kept["square 4-8"]
    frozen = dict(kept)
    found, _ = attack(network, labels, small(4), kept)
    assert all(kept[name] is piece for name, piece in frozen.items())
    for name, evidence in found.items():
        assert torch.equal(evidence.robust, in_two_chunks[0][name].robust)
        assert torch.equal(evidence.images, in_two_chunks[0][name].images)


def test_a_piece_of_fewer_images_is_never_taken_for_that_of_more(network: nn.Module, labels: Tensor) -> None:
    kept: dict[str, Any] = {}
    run(network, IMAGES[:6], labels[:6], small(4), pieces(kept))  # a chunk of four, then one of two
    found, _ = run(network, IMAGES, labels, small(4), pieces(kept))
    alone, _ = run(network, IMAGES, labels, small(4), pieces({}))
    assert torch.equal(found["square"].robust, alone["square"].robust)
    assert len(kept) == 3 * len(STANDARD)


def test_a_stop_leaves_with_the_finished_pieces_kept(network: nn.Module, labels: Tensor) -> None:
    kept: dict[str, Any] = {}
    with pytest.raises(StoppedError):
        run(network, IMAGES, labels, small(4), pieces(kept, lambda: len(kept) == 3))
    assert len(kept) == 3


def test_witnesses_are_misclassified_in_the_ball(
    network: nn.Module, labels: Tensor, in_two_chunks: Any
) -> None:
    evidence = in_two_chunks[0]["square"]
    x = (IMAGES / 255)[evidence.indices]
    assert len(evidence.indices) == int((~evidence.robust).sum())
    assert (evidence.images - x).abs().max() <= 0.05 + 1e-6
    assert 0 <= evidence.images.min() <= evidence.images.max() <= 1
    assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()


def test_the_packages_warnings_are_returned(network: nn.Module, labels: Tensor) -> None:
    _, warnings = attack(nn.Sequential(network, nn.Softmax(1)).eval(), labels, small(8), {})
    assert any("probability distribution" in warning for warning in warnings)


def test_no_forward_of_any_attack_is_larger_than_the_batch(in_two_chunks: Any) -> None:
    assert len(FORWARDED) > 5000  # the copies that craft are counted too
    assert max(FORWARDED) == 4 < len(IMAGES)


def test_crafted_in_bf16_no_success_is_false_and_few_are_missed(
    network: nn.Module, labels: Tensor, in_two_chunks: Any
) -> None:
    found, _ = attack(network, labels, small(4).model_copy(update={"precision": "bf16"}), {})
    evidence = found["square"]
    assert len(evidence.indices) == int((~evidence.robust).sum()) > 0
    assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()
    assert ((evidence.images - (IMAGES / 255)[evidence.indices]).abs() <= 0.05 + 1e-6).all()
    assert int((evidence.robust != in_two_chunks[0]["square"].robust).sum()) <= 1


def test_what_float32_does_not_confirm_is_attacked_again_in_float32(
    network: nn.Module, labels: Tensor
) -> None:
    spec, x = small(8), IMAGES / 255
    wrong = nn.Sequential(network, nn.Flatten(1)).eval()
    wrong[1].register_forward_hook(lambda _, inputs, logits: logits.roll(1, 1))  # every verdict is wrong
    liar, honest = (_package(each, spec, x.device, 10) for each in (wrong, network))
    everybody = torch.ones(8, dtype=torch.bool)
    alone, expected, found = (
        _run_piece(network, packages, "apgd-ce", x, labels, everybody, spec)
        for packages in ([liar], [honest], [liar, honest])
    )
    assert len(expected["broken"]) > 0
    assert len(alone["broken"]) == 0
    assert torch.equal(found["broken"], expected["broken"])
    assert torch.equal(found["images"], expected["images"])
