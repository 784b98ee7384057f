"""AutoAttack in chunks: the same as the package in one go, resumable, and with its warnings kept."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack as Package
from torch import Tensor, nn

from dynat.config.attack import AutoAttack, AutoAttackRun
from dynat.config.params import load as load_params
from dynat.data.sources import prepare
from dynat.data.splits import load
from dynat.evaluation import autoattack
from dynat.evaluation.autoattack import STANDARD, Ensemble, evaluate
from dynat.evaluation.chunks import Chunk, Chunks, StoppedError
from dynat.evaluation.evidence import Evidence
from dynat.methods.step import Engine
from dynat.methods.training import Training
from dynat.networks.architectures import build

pytestmark = pytest.mark.slow
IMAGES = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Found = tuple[dict[str, Evidence], list[str]]


class Short(Package):
    """The package with fewer steps and queries: how many there are is the package's own matter."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 100


@pytest.fixture(autouse=True, scope="module")
def short() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoattack, "Package", Short)
        yield


PARAMS = load_params()


def small(batch: int) -> AutoAttack:
    return AutoAttack(epsilon=0.05, n=[8], batch=batch, workers=1, seed=3)


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


def attack(
    network: nn.Module,
    labels: Tensor,
    batch: int,
    kept: dict[str, Chunk] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Found:
    """Attack as many images as there are labels, with chunks kept in ``kept``."""
    kept = {} if kept is None else kept
    chunks = Chunks(kept.get, kept.__setitem__, stopped)
    return evaluate(network, IMAGES[: len(labels)], labels, small(batch), chunks)


def assert_equal(found: Found, expected: Found) -> None:
    assert found[1] == expected[1]
    assert list(found[0]) == list(expected[0])
    for name, evidence in found[0].items():
        for part in ("robust", "indices", "images"):
            assert torch.equal(getattr(evidence, part), getattr(expected[0][name], part)), (name, part)


FORWARDED: list[int] = []  # rows of every forward of the run in two batches
KEPT: dict[str, Chunk] = {}  # its chunks


@pytest.fixture(scope="module")
def in_two_batches(short: None, network: nn.Module, labels: Tensor) -> Found:
    hook = network.register_forward_hook(lambda _, inputs, output: FORWARDED.append(len(output)))
    found = attack(network, labels, 4, KEPT)
    hook.remove()
    return found


def test_one_batch_gives_the_verdicts_of_the_package(network: nn.Module, labels: Tensor) -> None:
    found, _ = attack(network, labels, 8)
    package = Short(network, eps=0.05, seed=3, version="standard")
    _, predicted = package.run_standard_evaluation(IMAGES / 255, labels, batch_size=8)
    assert torch.equal(found["square"].robust, predicted == labels)
    assert 0 < (predicted == labels).sum() < 8


def test_standard_is_the_four_attacks_with_their_published_counts(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoattack, "Package", Package)
    ensemble = Ensemble(network, IMAGES / 255, small(8))
    assert STANDARD == ("apgd-ce", "apgd-t", "fab-t", "square")
    for package in ensemble.packages:
        assert tuple(package.attacks_to_run) == tuple(ensemble.attacks) == STANDARD
        assert (package.apgd.n_iter, package.apgd.n_restarts) == (100, 1)
        assert (package.apgd_targeted.n_iter, package.apgd_targeted.n_target_classes) == (100, 9)
        assert (package.fab.n_iter, package.fab.n_target_classes, package.square.n_queries) == (100, 9, 5000)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_own_data_may_have_fewer_classes_than_the_attack_has_targets(classes: int) -> None:
    torch.manual_seed(0)
    network = build("cnn", classes, 1, width=8, depth=1).eval()
    truth = network(IMAGES / 255).argmax(1)
    found, warnings = attack(network, truth, 8)
    assert found["clean"].robust.all()
    evidence = found["square"]
    assert (network(evidence.images).argmax(1) != truth[evidence.indices]).all()
    assert any("apgd-t needs four classes" in warning for warning in warnings) == (classes < 4)
    assert ("apgd-t" in found) == (classes >= 4)


def test_finished_chunks_are_not_run_again_and_change_nothing(
    network: nn.Module, labels: Tensor, in_two_batches: Found
) -> None:
    assert len(KEPT) == 2 * len(STANDARD)
    frozen = {name: chunk for name, chunk in KEPT.items() if name not in ("fab-t 4-8", "square 4-8")}
    kept = dict(frozen)
    assert_equal(attack(network, labels, 4, kept), in_two_batches)
    assert set(kept) == set(KEPT)
    assert all(kept[name] is chunk for name, chunk in frozen.items())


def test_a_chunk_of_fewer_images_is_never_taken_for_that_of_more(
    network: nn.Module, labels: Tensor, in_two_batches: Found
) -> None:
    kept: dict[str, Chunk] = {}
    attack(network, labels[:6], 4, kept)  # a batch of four, then one of two
    assert_equal(attack(network, labels, 4, kept), in_two_batches)
    assert len(kept) == 3 * len(STANDARD)


def test_one_attack_on_chosen_images_is_what_it_is_in_the_ensemble(
    network: nn.Module, labels: Tensor, in_two_batches: Found
) -> None:
    before = in_two_batches[0]["apgd-ce"].robust[4:]
    alone = Ensemble(network, IMAGES / 255, small(4)).attack("apgd-t", IMAGES[4:] / 255, labels[4:], before)
    expected = KEPT["apgd-t 4-8"]
    assert all(torch.equal(alone[part], expected[part]) for part in ("broken", "images"))


def test_a_stop_leaves_with_the_finished_chunks_kept(network: nn.Module, labels: Tensor) -> None:
    kept: dict[str, Chunk] = {}
    with pytest.raises(StoppedError):
        attack(network, labels, 4, kept, lambda: len(kept) == 3)
    assert len(kept) == 3


def test_witnesses_are_misclassified_in_the_ball(
    network: nn.Module, labels: Tensor, in_two_batches: Found
) -> None:
    evidence = in_two_batches[0]["square"]
    x = (IMAGES / 255)[evidence.indices]
    assert len(evidence.indices) == int((~evidence.robust).sum()) > 0
    assert (evidence.images - x).abs().max() <= 0.05 + 1e-6
    assert 0 <= evidence.images.min() <= evidence.images.max() <= 1
    assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()


def test_the_packages_warnings_are_returned(network: nn.Module, labels: Tensor) -> None:
    _, warnings = attack(nn.Sequential(network, nn.Softmax(1)).eval(), labels, 8)
    assert any("probability distribution" in warning for warning in warnings)


def test_no_forward_of_any_attack_is_larger_than_the_batch(in_two_batches: Found) -> None:
    assert len(FORWARDED) > 200  # the copies that craft are counted too
    assert max(FORWARDED) == 4 < len(IMAGES)


def test_crafted_in_bf16_no_success_is_false_and_few_are_missed(
    network: nn.Module, labels: Tensor, in_two_batches: Found
) -> None:
    found, _ = evaluate(network, IMAGES, labels, small(4).model_copy(update={"precision": "bf16"}))
    evidence = found["square"]
    assert len(evidence.indices) == int((~evidence.robust).sum()) > 0
    assert (network(evidence.images).argmax(1) != labels[evidence.indices]).all()
    assert ((evidence.images - (IMAGES / 255)[evidence.indices]).abs() <= 0.05 + 1e-6).all()
    assert int((evidence.robust != in_two_batches[0]["square"].robust).sum()) <= 1


def test_what_float32_does_not_confirm_is_attacked_again_in_float32(
    network: nn.Module, labels: Tensor
) -> None:
    x = IMAGES / 255
    wrong = nn.Sequential(network, nn.Flatten(1)).eval()
    wrong[1].register_forward_hook(lambda _, inputs, logits: logits.roll(1, 1))  # every verdict is wrong
    liar, honest = (Ensemble(each, x, small(8)).packages[0] for each in (wrong, network))
    ensemble, everybody = Ensemble(network, x, small(8)), torch.ones(8, dtype=torch.bool)

    def crafted_by(*packages: Package) -> Chunk:
        ensemble.packages = list(packages)
        return ensemble.attack("apgd-ce", x, labels, everybody)

    alone, expected, found = crafted_by(liar), crafted_by(honest), crafted_by(liar, honest)
    assert len(expected["broken"]) > 0
    assert len(alone["broken"]) == 0
    assert torch.equal(found["broken"], expected["broken"])
    assert torch.equal(found["images"], expected["images"])


def test_below_float32_apgd_alone_is_tried_and_every_survivor_withstands_it_in_float32(
    network: nn.Module, labels: Tensor
) -> None:
    x, everybody = IMAGES / 255, torch.ones(8, dtype=torch.bool)
    ensemble = Ensemble(network, x, small(8).model_copy(update={"precision": "bf16"}))
    exact = Ensemble(network, x, small(8))
    assert exact.reduced is None
    assert ensemble.reduced is not None
    ran: list[tuple[str, int, int]] = []  # which package, on how many samples, how many it broke

    def watch(kind: str, package: Package) -> None:
        def run(x: Tensor, y: Tensor, **options: int) -> Any:
            found = Package.run_standard_evaluation(package, x, y, **options)
            ran.append((kind, len(x), int((network(found[0]).argmax(1) != y).sum())))
            return found

        package.run_standard_evaluation = run

    watch("reduced", ensemble.reduced)
    watch("exact", ensemble.packages[0])
    for name in STANDARD:
        ran.clear()
        chunk = ensemble.attack(name, x, labels, everybody)
        if name.startswith("apgd"):
            (first, count, broken), (second, left, _) = ran
            assert (first, count, second, left) == ("reduced", 8, "exact", 8 - broken)
        else:
            assert ran == [("exact", 8, len(chunk["broken"]))]
            assert torch.equal(chunk["images"], exact.attack(name, x, labels, everybody)["images"])


class Misreading(nn.Module):
    """A copy that takes every image for another class than the network does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return -self.network(x)


def test_a_sample_that_only_the_copy_misreads_is_attacked_all_the_same(
    network: nn.Module, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = attack(network, labels, 8)
    monkeypatch.setattr(autoattack, "fold", lambda network: Misreading(network).eval())
    found, _ = attack(network, labels, 8)
    assert 0 < expected["square"].robust.sum() < 8
    for name in STANDARD:
        assert torch.equal(found[name].robust, expected[name].robust)


def test_each_radius_has_the_verdicts_of_a_study_of_its_own_and_keeps_its_chunks_apart(
    network: nn.Module, labels: Tensor
) -> None:
    networks: Any = SimpleNamespace(images=IMAGES, labels=labels, load=lambda name: (network, 3))
    store: dict[str, Chunk] = {}
    chunks = Chunks(store.get, store.__setitem__)
    one, other = small(4), small(4).model_copy(update={"epsilon": 0.02, "n": [4]})
    both = one.model_copy(update={"n": [8], "runs": [AutoAttackRun(epsilon=0.02, n=[2, 4])]})
    found = autoattack.evaluate_selected(networks, both, chunks)
    assert len(store) == 4 * 2 + 4
    alone = [autoattack.evaluate_selected(networks, each, Chunks()) for each in (one, other)]
    for evaluation, suffix in zip(alone, ("", " at 0.02"), strict=True):
        for name, evidence in evaluation.evidence["best"].items():
            again = found.evidence["best"][name + suffix]
            assert torch.equal(evidence.robust, again.robust)
            assert torch.equal(evidence.images, again.images)
    assert list(found.union) == ["n8", "n2 at 0.02", "n4 at 0.02"]
    assert found.union["n4 at 0.02"] == alone[1].union["n4"]
    made = dict(store)
    autoattack.evaluate_selected(networks, both, chunks)
    assert store == made  # nothing is computed again


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_no_digit_that_withstands_apgd_tried_in_bf16_is_broken_by_it_in_float32(
    name: str, digits: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoattack, "Package", Package)  # with all of its steps
    target, x, y = digits
    right = target(x).argmax(1) == y
    assert len(y) == 400
    for epsilon in (0.03, 0.06, 0.1):
        robust = {}
        for precision in ("fp32", "bf16"):
            spec = AutoAttack(epsilon=epsilon, n=[400], batch=400, precision=precision)
            robust[precision] = right.clone()
            robust[precision][Ensemble(target, x[:1], spec).attack(name, x, y, right)["broken"]] = False
        assert 20 < int(robust["bf16"].sum()) <= int(robust["fp32"].sum())
        assert not (robust["bf16"] & ~robust["fp32"]).any()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network after four epochs of adversarial training, 400 test images and their labels."""
    study, recipe = PARAMS.study["digits"], PARAMS.recipe("digits", "pgd_at")
    file = tmp_path_factory.mktemp("digits") / "digits.safetensors"
    prepare(study.data, file, "data")
    digits = load(file, torch.device("cpu"))
    torch.manual_seed(0)
    target = build("cnn", 10, 1, width=16, depth=1, stem_stride=2)
    short = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"epochs": 4})})
    training = Training(Engine(short, target, None), study.train, digits, 0)
    assert training.run(lambda _: None)
    target.eval().requires_grad_(False)
    return target, digits.test_images / 255, digits.test_labels
