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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dynat.config.params import Machine
from dynat.config.recipe import Precision
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


def refuse_unfit(key: str, machine: Machine) -> None:
    """Raise :class:`UserError`, naming a key of ``key``, if ``machine`` asks for what this one has not."""
    import torch

    if machine.device == "cuda" and not torch.cuda.is_available():
        remedy = f"-S {key}.device=cpu insists on a CPU, for days to weeks; dvc checkout brings back outputs"
        raise UserError(f"{key}.device: cuda, but there is no CUDA device here; {remedy}")
    offered = torch.backends.cpu.get_cpu_capability()
    pinned = os.environ.get("ATEN_CPU_CAPABILITY") == PINNED["ATEN_CPU_CAPABILITY"]
    if machine.instructions and (
        offered == "DEFAULT" or (pinned and offered != machine.instructions.upper())
    ):
        asked = f"{key}.instructions: {machine.instructions}, but this CPU offers only {offered}"
        raise UserError(f"{asked}; -S {key}.instructions=null runs without the pin")


def memory_of(machine: Machine) -> int:
    """Bytes of the memory that ``machine`` trains in: the GPU's or, without one, the computer's."""
    import torch

    if machine.device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_of(machine: Machine, key: str) -> "torch.device":
    """Apply threads and determinism to torch and return the device that the setting computes on.

    Raises :class:`UserError`, naming a key of ``key``, if ``machine`` asks for what this one has not.
    """
    import torch

    gc.enable()
    refuse_unfit(key, machine)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler
    # thousands of kernels in a step, for memory that nothing reads
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if machine.device != "cpu" and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def compiler(key: str, device: "torch.device") -> str:
    """The version of the compiler that ``torch.compile`` calls: C++ for a CPU, C (by Triton) for CUDA.

    Raises :class:`UserError`, naming ``key``, if there is none or it would not find Python's headers.
    """
    variable, usual = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    command = shlex.split(os.environ.get(variable) or usual)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UserError(f"{key}: Python.h is not here; install Python's headers or set {key}=eager")
    if not shutil.which(command[0]):
        remedy = f"install one, name one in {variable}, or set {key}=eager"
        raise UserError(f"{key}: found no compiler {command[0]}; {remedy}")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return version.stdout.partition("\n")[0]


def precision_of(precision: str, device: "torch.device") -> Precision:
    """What ``device`` computes convolutions in: "auto" is tf32 where it is there, as the published code ran.

    Only CUDA devices of compute capability 8.0 and later have tf32; elsewhere it means fp32.
    """
    import torch

    if precision == "bf16":
        return "bf16"
    there = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if there and precision != "fp32" else "fp32"


@contextmanager
def convolutions(precision: Precision) -> Iterator[None]:
    """Convolutions of float32 tensors inside use TF32, or are float32 throughout, on every thread.

    The switch is one for the process: a backward pass obeys the one that holds while it runs.
    """
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def fingerprint(device: "torch.device") -> dict[str, str]:
    """What a bit-exact continuation depends on beside code, data and parameters."""
    import torch

    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
    }
