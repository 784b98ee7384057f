"""RobustBench: its own classes load what is published, and its leaderboard has the keys and texts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import params, write

from dynat.config.network import Checkpoint, Network
from dynat.config.params import DataSpec
from dynat.data.sources import prepare
from dynat.data.splits import Splits, load
from dynat.errors import UserError
from dynat.networks.architectures import build
from dynat.networks.weights import save_weights
from dynat.publish import robustbench
from dynat.publish.audited import Release

ROOT = Path(__file__).parents[2]
CIFAR10_JPEG = ROOT.parent / "shared/data/cifar10-jpeg.tar.gz"
SHA256 = "4ee3e17dc708ea43c24042afc68ef73e15e63452a00da3a2f14150caa996d3ed"
SHIPPED = Path(pyautoattack.__file__).parent / "examples/model_test.pt"  # ResNet-18, naturally trained
RESNET18 = {"name": "resnet", "num_classes": 10, "in_channels": 3}
NORMALISED = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2471, 0.2435, 0.2616]}
KEYS = [  # of the 236 published ones 62 have these in this order without the footnote, 32 with it
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue"),
    *("architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable"),
]

RECEIVE = """
import runpy, sys, types
import torch
from safetensors.torch import load_file, save_file
package, zoo, weights, images, out = sys.argv[1:]
for name in ("robustbench", "robustbench.model_zoo"):  # whose own imports need its broken attacks
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{package}/{name.replace('.', '/')}"]
(entry,) = runpy.run_path(zoo)["linf"].values()
network = entry["model"]().eval()
assert type(network).__module__ != "dynat" and "dynat" not in sys.modules
network.load_state_dict(torch.load(weights, weights_only=True), strict=True)
with torch.no_grad():
    parts = [network(part) for part in load_file(images)["images"].split(100)]
save_file({"logits": torch.cat(parts)}, out)
"""


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RobustBench from PyPI, in a folder that no other test imports from."""
    folder, uv = tmp_path_factory.mktemp("robustbench"), shutil.which("uv")
    command = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    command += ["install", "--quiet", "--no-deps", "--target", str(folder), "robustbench==1.1.1"]
    installed = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert installed.returncode == 0, installed.stderr
    return folder


def released(
    root: Path,
    spec: dict[str, Any],
    state: dict[str, torch.Tensor],
    data: Splits,
    *,
    epsilon: float = 8 / 255,
    clean: int = 86,
    n: int = 100,
) -> Release:
    """A release as the audit would hand it on, of weights and of synthetic results, ``clean`` right of n."""
    selection = params([], ["dynat"])
    study = selection.study["toy"]
    images = DataSpec(source="image_folder", archive="cifar10", classes=10)
    study = study.model_copy(update={"data": images})
    selection = selection.model_copy(update={"study": {"toy": study}})
    header = {"epsilon": epsilon}
    counts = {"clean": clean, "pgd10": 50, "pgd20": 49}
    write(root, "dynat", counts, n=n, aa={10: 4}, attack=header, autoattack=header)
    release = Release(root, "toy/dynat/0", selection, {}, {})
    release.__dict__["data"] = data
    save_weights(release.weights, state, {"epoch": "1", "network": json.dumps(spec)})
    return release


def noise(count: int = 8) -> Splits:
    """Random images of CIFAR-10's shape and classes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    return Splits(images, labels, images[:0], labels[:0], images, labels, tuple(robustbench.CIFAR10))


def received(folder: Path, package: Path, images: torch.Tensor, scratch: Path) -> torch.Tensor:
    """The logits of RobustBench's own network with the published weights, in a process of its own."""
    save_file({"images": images}, scratch / "images")
    (weights,) = folder.glob("models/cifar10/Linf/*.pt")
    arguments = (package, folder / "model_zoo/cifar10.py", weights, scratch / "images", scratch / "logits")
    command = [sys.executable, "-c", RECEIVE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    assert done.returncode == 0, done.stderr
    return load_file(scratch / "logits")["logits"]


def shipped() -> dict[str, torch.Tensor]:
    return dict(torch.load(SHIPPED, map_location="cpu", weights_only=True))


@torch.no_grad()
def logits_of(release: Release, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([release.network(part) for part in images.split(100)])


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.slow
def test_robustbench_loads_the_shipped_resnet18_strictly_with_equal_logits(
    package: Path, tmp_path: Path
) -> None:
    release = released(tmp_path, RESNET18, shipped(), noise())
    print(*robustbench.write(release, tmp_path / "out"))
    images = release.data.test_images.float() / 255
    found = received(tmp_path / "out", package, images, tmp_path)
    assert torch.allclose(found, logits_of(release, images), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_JPEG.exists(), reason="needs ../shared/data/cifar10-jpeg.tar.gz")
def test_robustbench_measures_the_clean_accuracy_of_the_shipped_resnet18(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(CIFAR10_JPEG.parent))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    archive = {"archive": CIFAR10_JPEG.name, "sha256": SHA256}
    spec = DataSpec(source="image_folder", classes=10, train=100, test=1000, **archive)
    prepare(spec, tmp_path / "data.safetensors")
    data = load(tmp_path / "data.safetensors", torch.device("cpu"))
    images = data.test_images.float() / 255
    network = build(**RESNET18).eval()
    network.load_state_dict(shipped())
    with torch.no_grad():
        logits = torch.cat([network(part) for part in images.split(100)])
    right = int((logits.argmax(1) == data.test_labels).sum())
    release = released(tmp_path, RESNET18, shipped(), data, clean=right, n=1000)
    print(*robustbench.write(release, tmp_path / "out"))
    (entry,) = (tmp_path / "out/model_info/cifar10/Linf").iterdir()
    stated = float(json.loads(entry.read_text())["clean_acc"])
    found = received(tmp_path / "out", package, images, tmp_path)
    measured = 100 * (found.argmax(1) == data.test_labels).double().mean()
    assert abs(measured - stated) <= 0.05
    assert stated > 85  # of all 10,000 images 85.57


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"name": "resnet", "blocks": [1, 1, 1, 1], **NORMALISED},
        {"name": "preact_resnet"},
        {"name": "preact_resnet", "blocks": [1, 1, 1, 1], **NORMALISED},
        {"name": "wrn", "depth": 10, "widen": 2},
        {"name": "wrn", "depth": 16, "widen": 1, "sub_block1": True, **NORMALISED},
    ],
    ids=lambda spec: f"{spec['name']}{'-normalised' * ('mean' in spec)}",
)
def test_robustbench_loads_every_family_strictly_with_equal_logits(
    package: Path, tmp_path: Path, spec: dict[str, Any]
) -> None:
    spec = {"num_classes": 10, "in_channels": 3, **spec}
    torch.manual_seed(0)
    network = build(**spec)
    for parameter in network.parameters():  # none at its initial value of one or zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    release = released(tmp_path, spec, network.state_dict(), noise())
    print(*robustbench.write(release, tmp_path / "out"))
    images = release.data.test_images.float() / 255
    found = received(tmp_path / "out", package, images, tmp_path)
    assert torch.allclose(found, logits_of(release, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"name": "cnn"}, "it has no class for 'cnn'"),
        ({"name": "resnet", "strides": [1, 1, 2, 2]}, "strides 1, 2, 2, 2"),
        ({"name": "preact_resnet", "width": 16}, "the width 64"),
        ({"name": "wrn", "in_channels": 1}, "3 channels"),
    ],
)
def test_another_network_is_refused_with_the_reason(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        robustbench.architecture_of({"num_classes": 10, **spec})


# --------------------------------------------------------------------------------------------- model_info


def info(tmp_path: Path, epsilon: float = 8 / 255) -> dict[str, Any]:
    release = released(tmp_path, RESNET18, {}, noise(), epsilon=epsilon)
    return robustbench.model_info(release, "ResNet-18")


def test_model_info_has_the_keys_and_texts_of_the_published_ones(tmp_path: Path) -> None:
    found = info(tmp_path)
    assert list(found) == KEYS
    assert (found["dataset"], found["eps"], found["architecture"]) == ("cifar10", "8/255", "ResNet-18")
    assert (found["clean_acc"], found["autoattack_acc"], found["reported"]) == ("86.00", "40.00", "")
    assert (found["link"], found["venue"]) == ("https://arxiv.org/abs/2408.13102", "ICONIP 2024")
    assert (found["additional_data"], found["unreliable"], found["number_forward_passes"]) == (
        False,
        False,
        1,
    )


def test_weights_that_learned_from_a_guide_name_it_and_say_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Checkpoint(file="w.pt", origin="somebody, on more data", network=Network(name="cnn"))
    selection = params([], ["dynat"]).model_copy(update={"checkpoint": {"them": given}})
    guides = {
        method: Release(tmp_path, f"toy/{method}/3", selection, {}, {}).guide
        for method in ("dynat", "rslad-dynat", "rslad-them")
    }
    assert guides == {
        "dynat": None,
        "rslad-dynat": {"run": "toy/guide-dynat/3", "origin": "trained here"},
        "rslad-them": {"run": "toy/them/0", "origin": "somebody, on more data"},
    }
    assert "Learned" not in info(tmp_path)["footnote"]
    monkeypatch.setattr(Release, "guide", guides["rslad-them"])
    text = "Learned from weights trained elsewhere: somebody, on more data."
    assert text in info(tmp_path)["footnote"].split("<br>")


def test_the_radius_0_031_has_the_published_footnote(tmp_path: Path) -> None:
    found = info(tmp_path, 0.031)
    assert found["eps"] == "0.031"
    assert found["footnote"].startswith(
        r"Uses \(\ell_{\infty} \) = 0.031 ≈ 7.9/255 instead of 8/255.<br>Clean accuracy on the first 100 test"
    )


def test_a_radius_of_no_leaderboard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no AutoAttack at 8/255 or 0\.031; set study\.toy\.autoattack"):
        info(tmp_path, 0.12)


def test_data_of_no_leaderboard_are_refused(tmp_path: Path) -> None:
    release = released(tmp_path, RESNET18, {}, noise()._replace(classes=tuple("abcdefghij")))
    with pytest.raises(UserError, match=r"study\.toy\.data\.source is image_folder"):
        robustbench.model_info(release, "ResNet-18")
