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


def written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 1, device: str = "cpu"
) -> dict[str, object]:
    run = Run("digits", "pgd_at", 0, load(ROOT / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    RunRecord("train", run).write(torch.device(device), processes, 0, "", None)
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


def nvml(monkeypatch: pytest.MonkeyPatch, readings: dict[int, list[float]]) -> None:
    """Three devices, "GPU-a" to "GPU-c", CUDA's in reverse order, that tell these millijoules in turn."""
    left = {index: iter(each) for index, each in readings.items()}
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-{'abc'[index]}",
        nvmlDeviceGetTotalEnergyConsumption=lambda index: next(left[index]),  # KeyError: it does not tell
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    order = {0: "c", 1: "b", 2: "a"}
    properties = lambda device: SimpleNamespace(uuid=order[getattr(device, "index", device)])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * 2**30 + device.index)
    monkeypatch.setattr(record, "circumstances", lambda device: {})


def test_energy_and_memory_are_those_of_the_runs_device_since_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(monkeypatch, {0: [1e6, 9e6], 1: [5e6, 5.25e6], 2: [0, 7e6]})
    found = written(tmp_path, monkeypatch, device="cuda:1")
    assert found["energy_joules"] == 250
    assert found["peak_memory_bytes"] == 7 * 2**30 + 1


def test_energy_of_several_processes_is_that_of_all_their_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(monkeypatch, {0: [1e6, 9e6], 1: [5e6, 5.25e6], 2: [0, 7e6]})
    assert written(tmp_path, monkeypatch, 2, "cuda:0")["energy_joules"] == 7000 + 250


def test_a_device_that_does_not_tell_its_energy_hides_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, energy in (("cuda:1", 250), ("cuda:0", None)):
        nvml(monkeypatch, {0: [1e6, 9e6], 1: [5e6, 5.25e6]})
        assert written(tmp_path, monkeypatch, device=device)["energy_joules"] == energy
    nvml(monkeypatch, {0: [1e6, 9e6], 1: [5e6, 5.25e6]})
    assert written(tmp_path, monkeypatch, 2, "cuda:0")["energy_joules"] is None  # half of it would be false
    nvml(monkeypatch, {1: [5e6]})  # gone at the end
    assert written(tmp_path, monkeypatch, device="cuda:1")["energy_joules"] is None


class Failing:
    """A library whose every call fails."""

    def __getattr__(self, name: str) -> object:
        raise OSError(name)


@pytest.mark.parametrize("library", [None, SimpleNamespace(), Failing()], ids=["absent", "empty", "failing"])
def test_a_driver_that_fails_costs_no_run(
    library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(monkeypatch, {})
    monkeypatch.setitem(sys.modules, "pynvml", library)  # None: importing it is an ImportError
    assert written(tmp_path, monkeypatch, device="cuda:0")["energy_joules"] is None
    assert written(tmp_path, monkeypatch)["energy_joules"] is None
