"""Where a stage computes: pinned instruction set, threads, device, compiler, precision.

``pin`` must run before torch is imported: oneDNN, MKL and ATen choose their kernels once, at first use.
"""

import gc
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from dynat.config.params import Machine
from dynat.config.recipe import Train
from dynat.errors import UserError

if TYPE_CHECKING:
    import torch

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # the only MKL branch that Intel and AMD processors share
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
}


def pin(machine: Machine) -> None:
    """Set what must be in the environment before torch is imported.

    Raises :class:`UserError` if torch is imported already and the environment did not have the pins before.
    """
    pinned = all(os.environ.get(name) == value for name, value in PINNED.items())
    if "torch" in sys.modules and machine.instructions is not None and not pinned:
        raise UserError("machine.instructions: torch is already imported, too late to pin the CPU")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # no kernel chosen by timing it
    if machine.instructions == "avx2":
        os.environ.update(PINNED)
    if machine.threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(machine.threads)
    gc.disable()  # until device_of: importing torch leaves no garbage, but a sixth of its time is the search


def refuse_missing_device(key: str, machine: Machine) -> None:
    """Raise :class:`UserError`, naming ``key``, if ``machine`` asks for a CUDA device and there is none."""
    if machine.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"{key}: cuda, but there is no CUDA device here; -S {key}=cpu insists on a CPU, for days to weeks"
        )


def device_of(machine: Machine) -> "torch.device":
    """Apply threads and determinism to torch and return the device that the setting computes on."""
    import torch

    gc.enable()
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "machine.device=cuda: no CUDA device is available; set machine.device=auto or cpu, and bring an "
            "output that this stage had before back with dvc checkout"
        )
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


def compiler(key: str, device: "torch.device") -> str:
    """The version of the compiler that ``torch.compile`` calls: C++ for a CPU, C (by Triton) for CUDA.

    Raises :class:`UserError`, naming ``key``, if there is none or it would not find Python's headers.
    """
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UserError(f"{key}: Python.h is not here; install Python's headers or set {key}=false")
    variable, names = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", ["g++"])
    if device.type == "cpu" and sys.platform == "darwin":
        names = ["clang++"]
    given = shlex.split(os.environ.get(variable, ""))
    for command in [given] if given else [[name] for name in names]:
        if shutil.which(command[0]):
            version = subprocess.run([*command, "--version"], capture_output=True, text=True)
            return version.stdout.partition("\n")[0]
    raise UserError(
        f"{key}: found no compiler {' or '.join(given[:1] or names)}; install one, name one in {variable}, "
        f"or set {key}=false"
    )


def precision_of(train: Train, device: "torch.device") -> "torch.dtype":
    """The type of a training's matrix products there: ``auto`` is bfloat16 where the device is fast at it."""
    import torch

    bf16 = train.precision == "bf16" or (train.precision == "auto" and fast_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


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
