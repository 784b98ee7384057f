"""What only stored weights, witnesses and losses can tell: --deep and --replay."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tampering
import torch
from pipelines import dvc
from safetensors.torch import load_file
from tampering import ATTACK, CELL

from dynat.audit import evidence
from dynat.audit.__main__ import main
from dynat.audit.printed import Printed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning"),  # of a package that DVC uses
]


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The audit in a process of its own, which pins the CPU as the stages do."""
    command = [sys.executable, "-m", "dynat.audit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_deep_and_replay_hold(finished: Path) -> None:
    result = process(finished, CELL, "--deep", "--replay", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fool the stored weights" in result.stdout
    assert "withstand pgd20" in result.stdout
    assert "the first 3 steps give the recorded losses to the bit" in result.stdout


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (tampering.witness_outside_the_ball, "1 adversarial images lie outside the ball of"),
        (tampering.witness_beyond_black, "1 adversarial images leave [0,1]"),
        (tampering.witness_without_attack, "adversarial images are classified right by the stored weights"),
        (tampering.witness_dropped, "1 samples are called broken without a witness"),
        (tampering.all_called_robust, "random robust samples withstand pgd20 again"),
        (tampering.weights, "is of other weights than"),
    ],
)
def test_evidence_that_does_not_hold_is_refused(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forge: Callable[[Path], None],
    said: str,
) -> None:
    monkeypatch.setattr(evidence, "device_of", lambda *machine: torch.device("cpu"))
    forge(repository)
    assert main([CELL, "--deep"]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert any(said in line for line in faults), faults


@pytest.mark.parametrize("name", ["fgsm", "cw", "apgd-ce"])
def test_every_attack_is_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(evidence, "device_of", lambda *machine: torch.device("cpu"))
    printed = Printed(finished)
    (source,) = printed.sources(f"digits/pgd_at/0/{name}")
    links = evidence.witness(printed, source)
    assert [link.state for link in links] == ["good", "good"]
    assert name.upper() in links[1].text.upper()


def test_a_broken_sample_called_robust_is_refuted_though_all_files_agree(repository: Path) -> None:
    """Verdict, metric, tables and dvc.lock forged together: hashes hold, the witness does not."""
    from dynat.evaluation.verdicts import accuracy, decode, encode

    witness = load_file(repository / f"{ATTACK}.witness.safetensors")["best/pgd20/indices"]
    assert len(witness)
    verdict_file, metric_file = (repository / f"{ATTACK}{suffix}" for suffix in (".verdicts.json", ".json"))
    found, stated = json.loads(verdict_file.read_text()), json.loads(metric_file.read_text())
    verdict = found["best"]["pgd20"]
    flags = decode(verdict["robust"], verdict["n"])
    flags[int(witness[0])] = True
    verdict["robust"], stated["best"]["pgd20"] = encode(flags), accuracy(flags)
    verdict_file.write_text(json.dumps(found, indent=1) + "\n")
    metric_file.write_text(json.dumps(stated, indent=1) + "\n")
    subprocess.run([sys.executable, "-m", "stages.tabulate"], cwd=repository, check=True)
    result = dvc(repository, "commit", "-f")
    assert result.returncode == 0, result.stdout + result.stderr
    assert main([CELL]) == 0, "hashes alone cannot tell"
    deep = process(repository, CELL, "--deep")
    assert deep.returncode == 1
    assert "1 samples are called robust and have a witness" in deep.stdout


def test_a_training_that_did_not_happen_is_not_replayed(repository: Path) -> None:
    """One loss of it, changed in its last bit."""
    path = repository / "models/digits/pgd_at/0/trace.csv"
    rows = path.read_text().splitlines()
    target, guide = rows[2].split(",")
    path.write_text("\n".join([*rows[:2], f"{math.nextafter(float(target), math.inf)},{guide}", *rows[3:]]))
    result = process(repository, CELL, "--replay", "3")
    assert result.returncode == 1
    assert "✗ replay digits/pgd_at/0" in result.stdout


def test_a_training_of_several_processes_is_said_not_to_be_replayed(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "metrics/runs/train/digits/pgd_at/0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    assert main([CELL, "--replay", "3"]) == 0
    assert "not repeated: 2 processes trained it" in capsys.readouterr().out
