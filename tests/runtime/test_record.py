"""The record of a run: what a machine tells, and nothing where it does not."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynat.config.params import load
from dynat.runtime import record
from dynat.runtime.record import RunRecord
from dynat.runtime.stage import Run

ROOT = Path(__file__).parents[2]


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 1) -> dict[str, object]:
    run = Run("digits", "pgd_at", 0, load(ROOT / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    RunRecord("train", run).write(torch.device("cpu"), processes, 0, "", None)
    found: dict[str, object] = json.loads((tmp_path / "metrics/runs/train/digits/pgd_at/0.json").read_text())
    return found


def test_time_of_all_processes_and_the_peak_of_memory_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 1900.0])
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    found = written(tmp_path, monkeypatch, processes=3)
    assert (found["seconds"], found["device_hours"]) == (1800, 1.5)
    assert 50 * 2**20 < int(str(found["peak_memory_bytes"])) < 64 * 2**30
    assert found["energy_joules"] is None


def test_a_package_that_is_not_installed_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package"))
    versions = written(tmp_path, monkeypatch)["versions"]
    assert isinstance(versions, dict)
    assert versions["no-such-package"] is None
    assert versions["torch"] == torch.__version__.partition("+")[0]


def test_energy_is_that_of_the_runs_device_since_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    millijoules = {0: iter([1e6, 9e6]), 1: iter([5e6, 5.25e6])}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}",
        nvmlDeviceGetTotalEnergyConsumption=lambda index: next(millijoules[index]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(record, "_uuid", lambda device: "GPU-1")
    assert written(tmp_path, monkeypatch)["energy_joules"] == 250


def test_a_driver_that_fails_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    assert written(tmp_path, monkeypatch)["energy_joules"] is None
