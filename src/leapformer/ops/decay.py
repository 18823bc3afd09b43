"""Decays that leave nothing: a log decay of -inf is a reset, and so is all that is as good as one.

Decays between two tokens are differences of running sums, and a sum that holds -inf, or -1e30, says nothing of what was
added before or after. So a step counts as no less than `least_step`, which leaves exactly 0 all the same, and sums are
taken in float64: they then err by less than 1e-11 over a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def least_step(compute_dtype: torch.dtype) -> float:
    """A log decay whose exponential is exactly 0 in ``compute_dtype``, float32 or float64."""
    return -1000.0 if compute_dtype == torch.float64 else -200.0


def running_sum(log_decay: Tensor, dim: int, compute_dtype: torch.dtype) -> Tensor:
    """Sums of the steps along ``dim``, in float64, whose differences say what is left between any two tokens."""
    return log_decay.to(torch.float64).clamp(min=least_step(compute_dtype)).cumsum(dim)


def without_resets(gradient: Tensor | None, log_decay: Tensor | None, compute_dtype: torch.dtype) -> Tensor | None:
    """The gradient of ``log_decay`` with exactly 0 where a step leaves nothing; found by differences, it is noise
    there. None without one."""
    if gradient is None or log_decay is None:
        return None
    return gradient.masked_fill(log_decay <= least_step(compute_dtype), 0)


def total_decay(log_decay: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The summed log decay of a stretch, [B, H], or [N, H] of N packed sequences, from that of its tokens [B, T, H]."""
    if cu_seqlens is None:
        return log_decay.sum(1, dtype=dtype)
    bounds = cu_seqlens.to(torch.int64)
    slots = torch.arange(log_decay.shape[1], device=log_decay.device)
    row = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    total = log_decay.new_zeros(bounds.shape[0] - 1, log_decay.shape[2], dtype=dtype)
    return total.index_add(0, row, log_decay[0].to(dtype))
