"""The ranks of a training that torchrun started: which one writes, and what they agree on.

A training in one process is the first of one rank, and nothing here waits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def is_first() -> bool:
    """Whether this process writes the run's folder."""
    if _joined():
        return dist.get_rank() == 0
    # Before the ranks have met, what torchrun said of them has to do.
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0


def count() -> int:
    return dist.get_world_size() if _joined() else 1


def meet() -> None:
    """Wait until every rank is here."""
    if _joined():
        dist.barrier()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The block is done by the first rank, and then by the others, which find what it has left on disk."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true in any rank."""
    if not _joined():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def mean(value: Tensor) -> float:
    """The mean of a scalar over the ranks."""
    if not _joined():
        return value.item()
    total = value.detach().double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
