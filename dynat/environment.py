"""Where a stage computes: pinned instruction set, threads, device, and the record of them.

``pin`` must run before torch is imported: oneDNN, MKL and ATen choose their kernels once, at first use.
"""

import os
import platform
import shutil
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dynat.params import Machine, UserError

if TYPE_CHECKING:
    import torch

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # the only MKL branch that Intel and AMD processors share
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
}
PACKAGES = ("torch", "torchvision", "numpy", "pyautoattack", "scikit-learn", "safetensors", "dvc", "mlflow")


def pin(machine: Machine) -> None:
    """Set what must be in the environment before torch is imported."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if machine.instructions == "avx2":
        os.environ.update(PINNED)
    if machine.threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(machine.threads)
    if "torch" in sys.modules and machine.instructions is not None:
        raise UserError("machine.instructions: torch is already imported, too late to pin the CPU")


def device_of(machine: Machine) -> "torch.device":
    """Apply threads and determinism to torch and return the device that the setting computes on."""
    import torch

    if machine.device == "cuda" and not torch.cuda.is_available():
        raise UserError("machine.device=cuda: no CUDA device is available; set machine.device=auto or cpu")
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if machine.instructions and torch.backends.cpu.get_cpu_capability() != machine.instructions.upper():
        raise UserError(
            f"machine.instructions={machine.instructions}: this CPU offers only "
            f"{torch.backends.cpu.get_cpu_capability()}; set machine.instructions=null to run without the pin"
        )
    use_cuda = machine.device == "cuda" or (machine.device == "auto" and torch.cuda.is_available())
    if use_cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def find_compiler(key: str) -> None:
    """Raise :class:`UserError`, naming ``key``, if there is no C and C++ compiler for ``torch.compile``."""
    for variable, names in {"CC": ("gcc", "clang"), "CXX": ("g++", "clang++")}.items():
        wanted = [os.environ[variable]] if os.environ.get(variable) else names
        if not any(map(shutil.which, wanted)):
            raise UserError(f"{key}: found no compiler {' or '.join(wanted)}; install one or set {key}=false")


def fast_bf16(device: "torch.device") -> bool:
    """Whether bfloat16 matrix products are much faster than float32 there (tensor cores, AMX)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported())


def fingerprint(device: "torch.device") -> dict[str, str]:
    """What a bit-exact continuation depends on beside code, data and parameters."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "accelerator": accelerator,
    }


def record(device: "torch.device") -> dict[str, Any]:
    """The volatile circumstances of a run: hardware and versions, for ``metrics/runs``."""
    return {
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": device.type,
            **fingerprint(device),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
