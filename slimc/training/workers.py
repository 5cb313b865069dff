"""Several processes that train one network: what `torchrun` starts, over gloo on processors and nccl on GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from slimc.errors import SlimcError, UsageError
from slimc.samples import Batch


@contextmanager
def joined() -> Iterator[None]:
    """Join the group that `torchrun` describes in the environment, for a while; nothing without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if (own := device()) is not None:
        torch.cuda.set_device(own)
    # Gradients of GPUs go over nccl; what is agreed upon otherwise is small and stays on the processor.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; the one with number 0 writes files and speaks."""
    return distributed.get_rank() if count() > 1 else 0


def device() -> torch.device | None:
    """This process's GPU; None for the processor."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None


def share(batch: Batch) -> Batch:
    """This process's part of a batch, as equal as can be."""
    if count() == 1:
        return batch
    if batch.count < count():
        raise UsageError(f"a batch of {batch.count} cannot be shared by {count()} processes; use larger batches")
    start, end = (batch.count * place // count() for place in (rank(), rank() + 1))
    return batch[start:end]


def weight(batch: Batch) -> float:
    """What this process's loss counts for, so that the mean over processes is the mean over the whole batch."""
    if count() == 1:
        return 1.0
    own = torch.tensor(float(batch.count))
    total = own.clone()
    distributed.all_reduce(total)
    return float(own) * count() / float(total)


def total(numbers: list[float]) -> list[float]:
    """Sums over processes."""
    if count() == 1:
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(values)
    found: list[float] = values.tolist()
    return found


def same(tensors: Iterable[Tensor]) -> None:
    """Give every process what process 0 has, in place."""
    if count() == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike]).cpu()
        distributed.broadcast(flat, 0)
        parts = torch.split(flat, [tensor.numel() for tensor in alike])
        for tensor, own in zip(alike, parts, strict=True):
            tensor.copy_(own.reshape(tensor.shape))


def any_of(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    if count() == 1:
        return flag
    value = torch.tensor(float(flag))
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value > 0)


def from_first(compute: Callable[[], Any]) -> Any:
    """What process 0 computes; where it fails, every process fails the same way."""
    if count() == 1:
        return compute()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except SlimcError as error:
            box[1] = error
    distributed.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]
