"""Several processes as one: what ``launch: torchrun --standalone --nproc-per-node=N`` needs.

Every process holds all data and takes its slice of each batch; gradients are averaged over the samples of
the whole batch, so a step is that of one process, but for batch norm: as in DistributedDataParallel each
process normalises by its own slice, and the running statistics of the first one are kept. Without torchrun
(``WORLD_SIZE`` unset or 1) nothing here does anything. Every process must call these functions in the same
order. Nothing is imported before it is needed: the CPU is pinned before torch.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Shares of an evaluation differ by hours; if one process dies, torchrun ends all.
PATIENCE = timedelta(days=1)
POLL_S = 0.1


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is; the first, 0, is the only one that writes."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def join(device: "torch.device") -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs and for what stays on the host."""
    if size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """Part from the others, once all work is done."""
    if size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def part(count: int) -> slice:
    """This process's slice of ``count`` samples; the slices differ by at most one sample."""
    return slice(rank() * count // size(), (rank() + 1) * count // size())


def total(value: "Tensor") -> "Tensor":
    """The sum of every process's ``value``; the tensor itself for one process."""
    if size() == 1:
        return value
    import torch.distributed as dist

    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def average(tensors: Sequence["Tensor"], count: int) -> None:
    """Replace means over this process's ``count`` samples by the means over everybody's, in place."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    weight = torch.full((1,), float(count), dtype=tensors[0].dtype, device=tensors[0].device)
    flat = torch.cat([weight, *(tensor.detach().flatten() * count for tensor in tensors)])
    dist.all_reduce(flat)
    _spread(flat[1:] / flat[0], tensors)


def share_first(tensors: Iterable["Tensor"]) -> None:
    """Replace floating-point ``tensors``, of one type, by those of the first process, in place.

    Others, such as the number of batches so far, are the same everywhere and left alone.
    """
    group = [tensor for tensor in tensors if tensor.is_floating_point()]
    if size() == 1 or not group:
        return
    import torch
    import torch.distributed as dist

    flat = torch.cat([tensor.detach().flatten() for tensor in group])
    dist.broadcast(flat, 0)
    _spread(flat, group)


def anyone(flag: bool, meanwhile: Callable[[], object] | None = None) -> bool:
    """Whether ``flag`` holds in any process; waits for the others, not for a GPU.

    ``meanwhile`` is called again and again during the wait, which may be long; signals are handled then.
    """
    if size() == 1:
        return flag
    import torch
    import torch.distributed as dist

    flags = torch.tensor([int(flag)])
    if meanwhile is None:
        dist.all_reduce(flags)
    else:
        work = dist.all_reduce(flags, async_op=True)
        while not work.is_completed():
            meanwhile()
            time.sleep(POLL_S)
        work.wait()
    return bool(flags.item())


def from_first(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first process's ``state`` in all of them: tensors, numbers, strings, lists and dicts, or None."""
    if size() == 1:
        return state
    import torch
    import torch.distributed as dist

    file = io.BytesIO()
    torch.save(state, file)
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0)
    if rank() > 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    received = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    return state if rank() == 0 else received


def _spread(flat: "Tensor", tensors: Sequence["Tensor"]) -> None:
    """Copy consecutive parts of ``flat`` into ``tensors``."""
    import torch

    with torch.no_grad():
        values = flat.split([tensor.numel() for tensor in tensors])
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value.view(tensor.shape))
