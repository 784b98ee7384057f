"""The volatile record of a run, in ``metrics/runs``: time, memory, energy, hardware, versions.

No output depends on it; ``python -m dynat.cost`` sets it beside the accuracies.
"""

import os
import platform
import resource
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynat.runtime.closure import code_key
from dynat.runtime.files import write_json
from dynat.runtime.machine import fingerprint
from dynat.runtime.stage import Run

if TYPE_CHECKING:
    import torch

FLEET = ("node", "gpu", "attempt")  # where a fleet ran it, and for which time; else None
PACKAGES = ("torch", "torchvision", "numpy", "pyautoattack", "scikit-learn", "safetensors", "dvc", "mlflow")


class RunRecord:
    """The record of one stage of one run, begun with the stage and written at its end."""

    def __init__(self, stage: str, run: Run) -> None:
        self.path = Path("metrics/runs", stage) / run.path("").with_suffix(".json")
        self.started, self.clock, self.energy = datetime.now(UTC), time.monotonic(), joules()
        self.values: dict[str, Any] = {
            "stage": os.environ.get("DVC_STAGE", stage),
            "experiment": os.environ.get("DVC_EXP_NAME"),
            "baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
            "seed": run.seed,
            "code": code_key(stage),
            **{name: os.environ.get(f"DYNAT_{name.upper()}") for name in FLEET},
        }

    def write(
        self,
        device: "torch.device",
        processes: int,
        resumed: int,
        model_sha256: str,
        mlflow_run_id: str | None,
    ) -> None:
        """Add hardware, versions and what else is known at the end, and write the file.

        Time and energy are those since the last start; energy is that of the devices of all ``processes``,
        None if one of them does not tell it, memory that of the first process.
        """
        seconds, used, now = time.monotonic() - self.clock, _uuids(device, processes), joules()
        known = used and all(each in self.energy and each in now for each in used)
        self.values |= {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "device_hours": round(seconds * processes / 3600, 5),
            "peak_memory_bytes": peak_memory(device),
            "energy_joules": round(sum(now[each] - self.energy[each] for each in used)) if known else None,
            **circumstances(device),
            "processes": processes,
            "resumed": resumed,
            "model_sha256": model_sha256,
            "mlflow_run_id": mlflow_run_id,
        }
        write_json(self.path, self.values)


def joules() -> dict[str, float]:
    """The energy that each CUDA device has taken since its driver was loaded, by UUID, where NVML tells it.

    Everything on the device counts. Empty without the package ``nvidia-ml-py`` or without a device.
    """
    found = {}
    with suppress(Exception):  # a driver may fail in many ways, and a record must not cost a training
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(Exception):  # nor the others' energy, where one is too old to tell its own
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                found[str(pynvml.nvmlDeviceGetUUID(handle))] = millijoules / 1000
    return found


def _uuids(device: "torch.device", processes: int) -> list[str]:
    """NVML's names of the CUDA devices of all processes, the first ones that CUDA sees; none for a CPU."""
    import torch

    used = [*range(processes)] if processes > 1 else [device]
    of = torch.cuda.get_device_properties
    return [f"GPU-{of(each).uuid}" for each in used] if device.type == "cuda" else []


def peak_memory(device: "torch.device") -> int:
    """Bytes of tensors on a CUDA device at their most; on a CPU of this process, forked workers apart."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def circumstances(device: "torch.device") -> dict[str, Any]:
    """Hardware and versions of this process, by name."""
    return {
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": device.type,
            **fingerprint(device),
        },
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
    }


def installed(package: str) -> str | None:
    """The installed version, None where there is none: a stage needs neither dvc nor mlflow."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
