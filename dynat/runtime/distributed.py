"""Several processes as one: what ``launch: torchrun --standalone --nproc-per-node=N`` needs.

Every process holds all data and takes its slice of each batch; gradients are averaged over the samples of
the whole batch, so a step is that of one process, but for batch norm: as in DistributedDataParallel each
process normalises by its own slice, and the running statistics of the first one are kept. Without torchrun
(``WORLD_SIZE`` unset or 1) nothing here does anything. Every process must call these functions in the same
order.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dynat.errors import UserError

# Shares of an evaluation differ by hours; if one process dies, torchrun ends all.
PATIENCE = timedelta(days=1)
POLL_S = 0.1


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is; the first, 0, is the only one that writes."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def launched(launch: str) -> int:
    """How many processes a ``launch`` of params.yaml starts, by torchrun's option for one machine.

    Raises :class:`UserError` for no number of processes, and for one per GPU where there is none.
    """
    found = re.search(r"--nproc[-_]per[-_]node[= ](\S+)", launch)
    if found is None:
        return 1
    if found[1] not in ("auto", "cpu", "gpu"):
        if not re.fullmatch("0*[1-9][0-9]*", found[1]):
            raise UserError(f"launch: {found[0]} must be a number of processes, gpu, cpu or auto")
        return int(found[1])
    if found[1] == "gpu" and not torch.cuda.is_available():
        raise UserError(f"launch: {found[0]}, but there is no CUDA device here; name a number, or python")
    return max(1, torch.cuda.device_count() if found[1] != "cpu" else os.cpu_count() or 1)


def join(device: torch.device) -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs and for what stays on the host."""
    if size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """Part from the others, once all work is done."""
    if size() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def part(count: int) -> slice:
    """This process's slice of ``count`` samples; the slices differ by at most one sample."""
    return slice(rank() * count // size(), (rank() + 1) * count // size())


def total(value: Tensor) -> Tensor:
    """The sum of every process's ``value``; the tensor itself for one process."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def least(value: Tensor) -> Tensor:
    """The least of every process's ``value``; the tensor itself for one process."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def average(tensors: Sequence[Tensor], count: int) -> None:
    """Replace means over this process's ``count`` samples by the means over everybody's, in place."""
    if size() == 1:
        return
    weight = torch.full((1,), float(count), dtype=tensors[0].dtype, device=tensors[0].device)
    flat = torch.cat([weight, *(tensor.detach().flatten() * count for tensor in tensors)])
    dist.all_reduce(flat)
    means = (flat[1:] / flat[0]).split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view(tensor.shape))


@torch.no_grad()
def share_first(tensors: Iterable[Tensor]) -> None:
    """Replace ``tensors`` by those of the first process, in place: a message for each type and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors if size() > 1 else ():
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.broadcast(flat, 0)
        for tensor, first in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(first.view(tensor.shape))


def anyone(flag: bool, meanwhile: Callable[[], object] | None = None) -> bool:
    """Whether ``flag`` holds in any process; waits for the others, not for a GPU.

    ``meanwhile`` is called again and again during the wait, which may be long; signals are handled then.
    """
    if size() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    work = dist.all_reduce(flags, async_op=True)
    while meanwhile is not None and not work.is_completed():
        meanwhile()
        time.sleep(POLL_S)
    work.wait()
    return bool(flags.item())


def from_first(number: int) -> int:
    """The first process's ``number`` in all of them."""
    shared = torch.tensor([number])
    share_first([shared])
    return int(shared)
