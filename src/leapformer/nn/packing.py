"""Packed sequences. Letters: T slots, N sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of(cu_seqlens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Which packed sequence each of ``slots`` int64 [T] belongs to, and its index in it, both int64 [T]."""
    bounds = cu_seqlens.to(torch.int64)
    row = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    return row, slots - bounds[row]
