"""Weights as people save them compute what their network computed, and what does not fit is named."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynat.config.network import Checkpoint
from dynat.errors import UserError
from dynat.networks.architectures import build
from dynat.networks.imported import fit, import_weights, inferred, read_state
from dynat.networks.weights import CODE, load_network

CPU = torch.device("cpu")
SMALL = {"name": "resnet", "blocks": [1, 1], "strides": [1, 2], "width": 8}
IMAGES = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
Saved = Callable[[nn.Module, Path], None]


def network(seed: int = 0, **spec: Any) -> nn.Module:
    """A network of which every value has been drawn."""
    torch.manual_seed(seed)
    found = build(num_classes=5, in_channels=3, **(spec or SMALL))
    for value in found.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return found.eval()


def checkpoint(**values: Any) -> Checkpoint:
    given = {"file": "w", "sha256": "0" * 64, "origin": "a test", "network": SMALL, **values}
    return Checkpoint.model_validate({key: value for key, value in given.items() if value is not None})


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        return load_network(path, CPU)[0](IMAGES.float() / 255)


class Takes(nn.Module):
    """A network that takes off the mean and divides by the deviation itself, as many are published."""

    def __init__(self, inner: nn.Module, names: tuple[str, str], shape: tuple[int, ...]) -> None:
        super().__init__()
        for name, values in zip(names, ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]), strict=True):
            self.register_buffer(name, torch.tensor(values).view(shape))
        self.names, self.model = names, inner

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (self.get_buffer(name).view(1, 3, 1, 1) for name in self.names)
        return self.model((x - mean) / std)


def parallel(each: nn.Module) -> nn.Module:
    return nn.DataParallel(each)


def compiled(each: nn.Module) -> nn.Module:
    return nn.ModuleDict({"_orig_mod": each})  # the names that torch.compile's wrapper has


@pytest.mark.parametrize(
    ("wrap", "content"),
    [
        (lambda each: each, lambda state: state),
        (lambda each: each, lambda state: {"state_dict": state, "epoch": 7, "best_acc": 0.5}),
        (parallel, lambda state: {"net": state, "acc": 91.2}),
        (lambda each: compiled(parallel(each)), lambda state: {"model": state, "optimizer": {"state": {}}}),
        (lambda each: nn.Sequential(nn.Identity(), each), lambda state: state),
        (lambda each: Takes(each, ("mean", "std"), (1, 3, 1, 1)), lambda state: state),
        (lambda each: parallel(Takes(each, ("mu", "sigma"), (3, 1, 1))), lambda state: {"model": state}),
    ],
    ids=["bare", "state_dict", "DataParallel", "compiled", "in Sequential", "mean and std", "mu and sigma"],
)
@pytest.mark.parametrize("ending", [".pt", ".pth", ".tar", ".safetensors"])
def test_a_file_as_people_save_it_gives_the_logits_of_its_network(
    tmp_path: Path, wrap: Any, content: Any, ending: str
) -> None:
    saved = wrap(network())
    file = tmp_path / f"w{ending}"
    if ending == ".safetensors":
        save_file(saved.state_dict(), file)
    else:
        torch.save(content(saved.state_dict()), file)
    import_weights(checkpoint(), file, tmp_path, IMAGES, 5)
    wanted = saved if isinstance(saved, nn.Module) and not isinstance(saved, nn.ModuleDict) else network()
    with torch.no_grad():
        expected = wanted(IMAGES.float() / 255)
    assert torch.allclose(logits(tmp_path / "target.safetensors"), expected, rtol=1e-5, atol=1e-5)


def test_weights_in_half_precision_are_those_values_in_single_precision(tmp_path: Path) -> None:
    state = network().half().state_dict()
    torch.save(state, tmp_path / "w.pt")
    found = read_state(tmp_path / "w.pt")
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in state.items())


def test_the_average_is_chosen_by_name_where_a_file_has_both(tmp_path: Path) -> None:
    states = {"model": network(0).state_dict(), "ema": network(1).state_dict()}
    torch.save(states, tmp_path / "w.pt")
    with pytest.raises(UserError, match="several state dicts, model, ema; choose one with entry"):
        read_state(tmp_path / "w.pt")
    found = read_state(tmp_path / "w.pt", "ema")
    assert torch.equal(found["linear.weight"], states["ema"]["linear.weight"])
    with pytest.raises(UserError, match="no state dict under 'emma'; it has model, ema"):
        read_state(tmp_path / "w.pt", "emma")


def test_the_uncalled_stage_of_a_published_wideresnet_and_old_counters_may_differ() -> None:
    spec = {"name": "wrn", "depth": 10, "widen": 1}
    with_stage = network(**spec, sub_block1=True)
    state = {k: v for k, v in with_stage.state_dict().items() if not k.endswith("num_batches_tracked")}
    plain = network(1, **spec)
    plain.load_state_dict(fit(state, plain, 3).state, strict=True)
    x = IMAGES.float() / 255
    with torch.no_grad():
        assert torch.equal(plain(x), with_stage(x))


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_file_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network().state_dict(), "args": Payload()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"it holds a getattr, which only code can make"):
        read_state(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "weights alone cannot be read"),
        (b"<!DOCTYPE html>", "weights alone cannot be read"),
        ({"epoch": 3}, "holds no weights; it has epoch"),
        ([1, 2], "holds a list, not a state dict"),
    ],
)
def test_a_file_without_weights_is_refused_with_what_it_holds(
    tmp_path: Path, content: Any, reason: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=reason):
        read_state(tmp_path / "w.pt")


def test_what_does_not_fit_is_named_both_ways_with_the_network_that_would() -> None:
    state = network(name="preact_resnet", blocks=[1, 2], strides=[1, 2], width=8).state_dict()
    with pytest.raises(UserError) as error:
        fit(state, network(), 3)
    assert re.match(
        r"the file lacks bn1\.weight, bn1\.bias, bn1\.running_mean and \d+ more; ", str(error.value)
    )
    assert "; has besides layer2.1.bn1.weight, layer2.1.bn1.bias," in str(error.value)
    fitting = "network: {name: preact_resnet, blocks: [1, 2], strides: [1, 2], width: 8} with 5 classes"
    assert str(error.value).endswith(f"it fits {fitting}")


def test_shapes_that_differ_are_named_with_both() -> None:
    with pytest.raises(UserError, match=r"has shapes linear\.weight \[5, 16\] for \[7, 16\]"):
        fit(network().state_dict(), build(num_classes=7, in_channels=3, **SMALL), 3)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "resnet", "blocks": [2, 1], "strides": [1, 2], "width": 8},
        {"name": "preact_resnet", "blocks": [1, 1, 1], "strides": [1, 2, 2], "width": 4},
        {"name": "wrn", "depth": 16, "widen": 2},
    ],
)
def test_a_network_of_ours_is_told_from_the_names_and_shapes_of_its_weights(spec: dict[str, Any]) -> None:
    assert inferred(network(**spec).state_dict()) == spec | {"classes": 5}
    assert inferred({"conv1.weight": torch.zeros(8, 3, 3, 3)}) is None


CODED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.features(x).relu().mean((2, 3)))
"""


class Theirs(nn.Module):
    """The network of that text."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu().mean((2, 3)))


def own(module: str) -> dict[str, Any]:
    """What says that the network is a class of that code."""
    sha256 = hashlib.sha256(CODED.encode()).hexdigest()
    return {"network": None, "module": module, "module_sha256": sha256}


def coded(tmp_path: Path) -> nn.Module:
    """A network of somebody's own code, which lies in ``tmp_path`` with its weights."""
    (tmp_path / CODE).write_text(CODED)
    found = Theirs()
    torch.save({"state_dict": nn.DataParallel(found).state_dict()}, tmp_path / "w.pt")
    return found


def test_a_network_of_somebodys_own_code_gives_its_logits_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = coded(tmp_path)
    given = checkpoint(**own("nets/net.py:Net"), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    import_weights(given, tmp_path / "w.pt", tmp_path, IMAGES, 5)
    assert f"warning: {tmp_path / CODE} is code that came with these weights" in capsys.readouterr().err
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    with torch.no_grad():
        expected = theirs((IMAGES.float() / 255 - mean) / std)
    assert torch.allclose(logits(tmp_path / "target.safetensors"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "classes", "reason"),
    [
        ("net.py:Other", 5, r"Other\(\) fails: AttributeError"),
        ("net.py:nn", 5, r"nn\(\) fails: TypeError"),
        ("net.py:Net", 7, r"gives logits \[4, 5\] for 4 images of 7 classes"),
    ],
)
def test_code_that_gives_no_network_for_these_images_is_refused(
    tmp_path: Path, module: str, classes: int, reason: str
) -> None:
    coded(tmp_path)
    with pytest.raises(UserError, match=reason):
        import_weights(checkpoint(**own(module)), tmp_path / "w.pt", tmp_path, IMAGES, classes)


def test_constants_that_contradict_the_files_own_are_refused(tmp_path: Path) -> None:
    torch.save(Takes(network(), ("mean", "std"), (3,)).state_dict(), tmp_path / "w.pt")
    given = checkpoint(mean=[0.5, 0.5, 0.5], std=[0.2, 0.3, 0.25])
    with pytest.raises(UserError, match=r"mean: \[0\.5, 0\.5, 0\.5\], but in the file it is \[0\.4"):
        import_weights(given, tmp_path / "w.pt", tmp_path, IMAGES, 5)


def test_code_that_changed_since_the_import_is_not_run(tmp_path: Path) -> None:
    coded(tmp_path)
    import_weights(checkpoint(**own("net.py:Net")), tmp_path / "w.pt", tmp_path, IMAGES, 5)
    (tmp_path / CODE).write_text(CODED.replace(".relu()", ".tanh()"))  # which has as many bytes
    with pytest.raises(UserError, match=r"network\.py: is not the code that these weights"):
        load_network(tmp_path / "target.safetensors", CPU)
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("constants", "reason"),
    [
        ({"std": [0.2, 0.3, 0.25]}, "has besides std"),
        (
            {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3, "norm.mean": [0.5] * 3, "norm.std": [0.5] * 3},
            "has besides",
        ),
        (
            {"mean": [125.3, 123.0, 113.9], "std": [63.0, 62.1, 66.7]},
            r"a mean of \[125\.\d+, .* pixels are in \[0,1\]",
        ),
    ],
    ids=["one alone", "two of them", "of other pixels"],
)
def test_a_normalisation_that_cannot_be_taken_over_is_refused(
    constants: dict[str, list[float]], reason: str
) -> None:
    state = network().state_dict() | {name: torch.tensor(values) for name, values in constants.items()}
    with pytest.raises(UserError, match=reason):
        fit(state, network(), 3)


def test_weights_that_two_names_claim_and_a_second_state_dict_are_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({**state, "module.linear.bias": state["linear.bias"]}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"has linear\.bias twice, once below module\.linear\.bias"):
        read_state(tmp_path / "w.pt")
    torch.save({"state_dict": {**state, "version": None}, "ema": state}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="several state dicts, state_dict, ema; choose one"):
        read_state(tmp_path / "w.pt")
    torch.save({**state, "ema": state}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="several state dicts, ema, the file itself; choose one"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["", "model.", "backbone.net."])
def test_the_fitting_network_is_told_also_where_the_chosen_one_is_of_another_family(prefix: str) -> None:
    state = {prefix + name: value for name, value in network().state_dict().items()}
    with pytest.raises(UserError, match=r"it fits network: \{name: resnet, blocks: \[1, 1\]"):
        fit(state, network(name="wrn", depth=10, widen=1), 3)
