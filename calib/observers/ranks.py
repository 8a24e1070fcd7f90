"""The few collectives observers need; every rank ends with the same bits."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.errors import InputError

LONGEST = datetime.timedelta(hours=12)  # a search or a rounding by rank 0 that the others wait for


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world(group: ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if distributed() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in the group; 0 where torch.distributed is not initialised."""
    return dist.get_rank(group) if distributed() else 0


def _wire(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x where the group's backend can take it."""
    backend = dist.get_backend(group)
    if backend == "nccl":
        x = x.to(torch.device("cuda", torch.cuda.current_device()))
    elif backend == "gloo":
        x = x.cpu()
    return x.contiguous()


def gathered(x: Tensor, group: ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's x, in the order of ranks; the shape must be the same on all."""
    if world(group) == 1:
        return [x]
    sent = _wire(x, group)
    parts = [torch.empty_like(sent) for _ in range(world(group))]
    dist.all_gather(parts, sent, group=group)
    return [part.to(x.device) for part in parts]


def summed(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, on x's device; x itself may be overwritten.

    One rank adds and hands out, because an all-reduce does not promise every rank the same rounding.
    """
    if world(group) == 1:
        return x
    sent = _wire(x, group)
    root = 0 if group is None else dist.get_global_rank(group, 0)
    dist.reduce(sent, root, group=group)
    dist.broadcast(sent, root, group=group)
    return sent.to(x.device)


def total(counts: Sequence[int], group: ProcessGroup | None = None) -> list[int]:
    """Each count summed over ranks."""
    return [int(c) for c in summed(torch.tensor(list(counts), dtype=torch.int64), group)]


def meet(what: str) -> None:
    """Wait for all ranks; a rank that is gone is named. Raises InputError."""
    if world() == 1:
        return
    try:
        dist.monitored_barrier(timeout=LONGEST, wait_all_ranks=True) if dist.get_backend() == "gloo" else dist.barrier()
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(
            f"a process of the run is gone, {what} ({line[:120]})",
            "start the run again with the same command: finished blocks stay",
        ) from error
