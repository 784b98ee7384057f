"""Weights from elsewhere are judged, printed and audited as what is trained here."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from pipelines import choose, commit, dvc, dvc_environment, stages_run
from safetensors.torch import load_file

from dynat.audit.__main__ import main as audit
from dynat.config.attack import Attack
from dynat.config.params import load
from dynat.data.download import verify_weights
from dynat.data.sources import prepare
from dynat.data.splits import load as load_images
from dynat.errors import UserError
from dynat.evaluation import whitebox
from dynat.networks.imported import import_weights
from dynat.networks.weights import load_network

ROOT = Path(__file__).parents[2]
CIFAR10_JPEG = ROOT.parent / "shared/data/cifar10-jpeg.tar.gz"
CPU = torch.device("cpu")


def put(repository: Path, mirror: Path) -> dict[str, Any]:
    """The target of ``digits/dynat/0`` as somebody else would hand it on, and its entry of params.yaml."""
    state = load_file(repository / "models/digits/dynat/0/target.safetensors")
    mirror.mkdir()
    torch.save({"net": {f"module.{name}": value for name, value in state.items()}}, mirror / "theirs.pth")
    network = load(repository / "params.yaml").study["digits"].target.model_dump(exclude_none=True)
    sha256 = hashlib.sha256((mirror / "theirs.pth").read_bytes()).hexdigest()
    return {"file": "theirs.pth", "sha256": sha256, "origin": "a test", "network": network}


CODED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, 10)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().view(len(x), -1))
"""


def put_code(repository: Path, mirror: Path) -> dict[str, Any]:
    """A network that is none of ours, drawn at random: its file, its weights, its entry of params.yaml."""
    (repository / "net.py").write_text(CODED)
    draw, shapes = torch.Generator().manual_seed(0), {"conv": (4, 1, 3, 3), "fc": (10, 256)}
    state = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    norm = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    state |= {f"norm.{name}": torch.full((4,), value) for name, value in norm.items()}
    torch.save(state, mirror / "coded.pt")
    sums = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in (("sha256", mirror / "coded.pt"), ("module_sha256", repository / "net.py"))
    }
    return {"file": "coded.pt", "origin": "a draw", "module": "net.py:Net", **sums}


@pytest.mark.slow
def test_the_same_weights_from_elsewhere_get_the_same_verdicts_and_an_audited_row(
    repository: Path,
    tmp_path: Path,
    quick_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry = put(repository, tmp_path / "mirror")
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path / "mirror"))
    entries = {"theirs": entry, "coded": put_code(repository, tmp_path / "mirror")}
    chosen = {"checkpoint": entries, "checkpoints": dict.fromkeys(entries, "digits")}
    choose(repository, chosen | {"distilled": ["rslad"], "guide_checkpoints": ["coded"], "seeds": [0]})
    done = dvc(repository, "repro", PATH=quick_path)
    assert done.returncode == 0, done.stdout + done.stderr
    own = {
        f"{s}@{name}" for s in ("import", "attack_checkpoint", "autoattack_checkpoint") for name in entries
    }
    own |= {f"{kind}_distilled_checkpoint@digits-rslad-coded-0" for kind in ("train", "attack", "autoattack")}
    assert stages_run(done) == own | {"check", "tabulate"}
    for kind in ("attack", "autoattack"):
        ours, theirs = (
            json.loads((repository / f"metrics/{kind}/digits/{name}/0.verdicts.json").read_text())
            for name in ("dynat", "theirs")
        )
        assert theirs["best"] == ours["best"]
        assert theirs.keys() == {"best"}  # which has no other epoch
    table = (repository / "metrics/tables/digits.md").read_text()
    chosen, last = table.split("digits, last epoch")
    assert re.search(r"^\| theirs ", chosen, re.MULTILINE)
    for origin in ("a test", "a draw"):
        assert re.search(rf"^\S+ weights trained elsewhere: {origin} *$", chosen, re.MULTILINE)
    assert re.search(r"^\S+ learned from weights trained elsewhere: a draw *$", chosen, re.MULTILINE)
    assert "other code" not in chosen
    for part, rows in ((chosen, ["theirs", "coded", "rslad-coded"]), (last, ["rslad-coded"])):
        here = re.findall(r"^\| (theirs|coded|rslad-\w+) ", part, re.MULTILINE)
        assert sorted(here) == sorted(rows)
    commit(repository, "theirs")
    assert audit(["--all"]) == 0
    for name in entries:
        assert audit([f"digits/{name}/0/pgd20", "--deep", "--replay", "1"]) == 0
    command = [sys.executable, "-m", "dynat.audit", "digits/rslad-coded/0/pgd20", "--deep", "--replay", "2"]
    done = subprocess.run(command, env=dvc_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metrics/runs/import/digits/coded/0.json" in done.stdout
    assert "coded.pt: at hand, with the hash that params.yaml says" in done.stdout
    assert "the first 2 steps give the recorded losses to the bit" in done.stdout
    said = capsys.readouterr().out
    assert "theirs.pth: at hand, with the hash that params.yaml says" in said
    assert "no step of theirs can be repeated" in said
    (tmp_path / "mirror/theirs.pth").write_bytes(b"other weights")
    (tmp_path / "mirror/coded.pt").write_bytes(b"other weights")
    for cell, file in (("digits/theirs/0/pgd20", "theirs.pth"), ("digits/rslad-coded/0/pgd20", "coded.pt")):
        assert audit([cell]) == 1
        assert f"{file}: expected sha256" in capsys.readouterr().out


def test_weights_or_code_without_a_hash_are_refused_with_the_line_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynat.config.network import Checkpoint

    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    contents = {"w.pt": b"weights", "net.py": b"code"}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    values = {"file": "w.pt", "origin": "a test", "module": "net.py:Net"}
    for key, name in (("module_sha256", "net.py"), ("sha256", "w.pt")):
        with pytest.raises(
            UserError, match=rf"^checkpoint\.x\.{key}: needed, .*; {key}: {sums[name]} is that"
        ):
            verify_weights(Checkpoint(**values), "checkpoint.x")
        values[key] = sums[name]
    assert verify_weights(Checkpoint(**values), "checkpoint.x")
    (tmp_path / "net.py").write_bytes(b"other code")
    with pytest.raises(UserError, match=r"^checkpoint\.x\.module_sha256: .*net\.py: expected sha256"):
        verify_weights(Checkpoint(**values), "checkpoint.x")


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_JPEG.exists(), reason="needs ../shared/data/cifar10-jpeg.tar.gz")
def test_the_shipped_example_is_above_85_percent_clean_and_pgd_20_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(CIFAR10_JPEG.parent))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    params = load(ROOT / "params.yaml")
    given = params.checkpoint["pyautoattack_resnet18"]
    spec = params.study["cifar10_tiny"].data.model_copy(update={"train": 100, "validation": 0, "test": 1000})
    prepare(spec, tmp_path / "data.safetensors")
    data = load_images(tmp_path / "data.safetensors", CPU)
    file = Path(pyautoattack.__file__).parent / given.file
    import_weights(given, file, tmp_path, data.test_images[:2], 10)
    network, _ = load_network(tmp_path / "target.safetensors", CPU)
    natural = whitebox.evaluate(network, data.test_images, data.test_labels, SPEC, [])["clean"]
    assert natural.robust.double().mean() > 0.85
    few = data.test_images[:200], data.test_labels[:200]
    assert not whitebox.evaluate(network, *few, SPEC, ["pgd"])["pgd20"].robust.any()


SPEC = Attack(epsilon=8 / 255, step=2 / 255, pgd=[20], batch=100)
