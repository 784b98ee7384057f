"""Several processes train as one: slices, gradients, statistics, one writer, stop and resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
import yaml
from pipelines import copy
from torch import Tensor

from dynat.runtime import distributed

TESTS = Path(__file__).parents[1]
Launch = list[str]


def torchrun(processes: int) -> Launch:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)])}


def test_slices_are_in_order_whole_and_even(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.part(7) == slice(0, 7)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for count in (3, 7, 8, 128):
        taken: list[int] = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            mine = list(range(count))[distributed.part(count)]
            assert len(mine) in (count // 3, count // 3 + 1)
            taken += mine
        assert taken == list(range(count))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes holds after two steps of every recipe."""
    folder = tmp_path_factory.mktemp("states")
    command = [*torchrun(2), str(TESTS / "two_processes.py"), str(folder)]
    result = subprocess.run(
        command, env=environment(TESTS.parent), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", two_processes.CASES)
def test_two_processes_step_as_one_does(name: str, states: list[dict[str, dict[str, Tensor]]]) -> None:
    alone = two_processes.train(name, normalised=False)
    for mine in states:
        assert mine[f"{name} False"].keys() == alone.keys()
        for key, value in alone.items():
            assert torch.allclose(mine[f"{name} False"][key], value, rtol=1e-9, atol=1e-12), key


@pytest.mark.slow
@pytest.mark.parametrize("name", two_processes.CASES)
def test_with_batch_norm_all_processes_hold_the_same_weights_and_statistics(
    name: str, states: list[dict[str, dict[str, Tensor]]]
) -> None:
    first, second = (state[f"{name} True"] for state in states)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    alone = two_processes.train(name, normalised=True)
    assert any(not torch.equal(value, alone[key]) for key, value in first.items() if "running_" in key)


# --------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy with prepared digits and a training of a few seconds."""
    folder = copy(tmp_path / "repository")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["study"]["digits"]["train"] |= {"epochs": 3, "batch": 200}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for stage in (["stages.check"], ["stages.prepare", "digits"]):
        assert run([sys.executable, "-m", *stage], folder).returncode == 0
    return folder


def run(command: Launch, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )


def outputs(folder: Path) -> dict[str, bytes]:
    found = sorted((folder / "models/digits/dynat_inner_awp/0").iterdir())
    return {path.name: path.read_bytes() for path in found}


CELL = ["-m", "stages.train", "digits", "dynat_inner_awp", "0"]


@pytest.mark.slow
def test_a_stopped_training_of_two_processes_goes_on_to_the_same_bits(repository: Path) -> None:
    straight = run([*torchrun(2), *CELL], repository)
    assert straight.returncode == 0, straight.stderr
    expected = outputs(repository)
    assert set(expected) >= {"target.safetensors", "guide.safetensors", "history.csv", "trace.csv"}
    assert straight.stdout.count("validation_robust") == 3  # one line per epoch: one process speaks
    process = subprocess.Popen(
        [*torchrun(2), *CELL],
        cwd=repository,
        env=environment(repository),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for path in (repository / "models/digits/dynat_inner_awp/0").iterdir():
        path.unlink()
    while "validation_robust" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "at the next run" in errors
    assert not list((repository / "models/digits/dynat_inner_awp/0").iterdir())
    again = run([*torchrun(2), *CELL], repository)
    assert again.returncode == 0, again.stderr
    assert "resumed in epoch" in again.stdout
    assert outputs(repository) == expected


@pytest.mark.slow
def test_a_batch_with_too_few_images_for_the_processes_is_refused_before_any_work(repository: Path) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    left = 1797 - params["study"]["digits"]["data"]["test"] - 100
    params["study"]["digits"]["train"]["batch"] = left - 1
    (repository / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    result = run([*torchrun(2), *CELL], repository)
    assert result.returncode != 0
    assert "last batch has 1 images for 2 processes" in result.stderr
    assert not (repository / "models/digits").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["attack", "autoattack"])
def test_two_processes_evaluate_to_the_same_bytes_as_one_and_share_the_work(
    repository: Path, stage: str
) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    study = params["study"]["digits"]
    study["attack"] |= {"batch": 5, "pgd": [2, 5], "cw_steps": 3, "apgd_steps": 5}
    study["autoattack"] |= {"n": [6], "batch": 2, "epsilon": 0.02}
    (repository / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert run([sys.executable, *CELL], repository).returncode == 0
    said = {}
    written: dict[int, dict[str, bytes]] = {}
    for processes in (1, 2):
        launch = torchrun(2) if processes == 2 else [sys.executable]
        result = run([*launch, "-m", f"stages.{stage}", *CELL[2:]], repository)
        assert result.returncode == 0, result.stderr
        said[processes] = [line for line in result.stdout.splitlines() if f" {stage}: " in line]
        files = [path for path in (repository / "metrics").rglob("0.*") if "runs" not in path.parts]
        written[processes] = {str(path): path.read_bytes() for path in files}
        for path in files:
            path.unlink()
    assert written[1] == written[2]
    assert len(written[1]) == (4 if stage == "attack" else 3)
    assert set(said[2]) < set(said[1])  # the first process tells of its own share
    # attack: four batches twice, and the sanity checks; AutoAttack: four attacks on three chunks
    assert (len(said[1]), len(said[2])) == ((9, 5) if stage == "attack" else (12, 8))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "other"])
def test_one_stopped_process_of_an_evaluation_takes_the_others_along(repository: Path, which: str) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    params["study"]["digits"]["autoattack"] |= {"n": [20], "batch": 2, "epsilon": 0.01}
    (repository / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert run([sys.executable, *CELL], repository).returncode == 0
    process = subprocess.Popen(
        [*torchrun(2), "-m", "stages.autoattack", *CELL[2:]],
        cwd=repository,
        env=environment(repository),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    while "autoattack: " not in process.stdout.readline():
        assert process.poll() is None
    (token,) = (repository / ".dvc/tmp/dynat").glob("?" * 64 + "/token")
    first = int(token.read_text().split()[-1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (other,) = [pid for pid in map(int, children) if pid != first and is_stage(pid)]
    begun = time.monotonic()
    os.kill(first if which == "first" else other, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert time.monotonic() - begun < 25  # before torchrun's patience of 30 s is over
    assert process.returncode != 0
    assert said.count("stopped; the finished chunks are kept") == 1
    assert not (repository / "metrics/autoattack").exists()
    assert list(token.parent.glob("*.pt"))


def is_stage(pid: int) -> bool:
    return b"stages.autoattack" in Path(f"/proc/{pid}/cmdline").read_bytes()
