"""Packed sequences, and which token of its sequence a slot is. Letters: B batch, T slots, N sequences, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_of(cu_seqlens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Which packed sequence each of ``slots`` int64 [T] belongs to, and its index in it, both int64 [T]."""
    bounds = cu_seqlens.to(torch.int64)
    row = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    return row, slots - bounds[row]


def check_packing(name: str, shape: Sequence[int], cu_seqlens: Tensor | None, *, what: str = "cu_seqlens") -> None:
    """Refuse bounds int [N + 1] that don't divide the one row of something of ``shape`` [1, T, ...]; None: nothing is
    packed.

    The values are looked at on the CPU only; elsewhere that would be a synchronisation for every layer.
    """
    if cu_seqlens is None:
        return
    B, T = shape[:2]
    if B != 1:
        raise ValueError(f"{name} with {what}: expected a batch of 1 (packed sequences lie in one row), got {B}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"{name}: expected {what} int32 or int64 [N + 1], N >= 1, got {found}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        found = f"{bounds[0]} ... {bounds[-1]}" if bounds == sorted(bounds) else "a fall"
        raise ValueError(f"{name}: expected {what} rising from 0 to the {T} slots, got {found}")


def token_positions(
    T: int,
    device: torch.device,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """How many real tokens stand before each of T slots, int64 [1 or B, T]: in its row, or in its packed sequence.

    key_mask: bool [B, T], True = real; a slot of padding has the position of the token before it, 0 where there is
    none.
    first: int64 [B or N], what each row or sequence counts from; None: 0.
    """
    slots = torch.arange(T, device=device)
    if cu_seqlens is None:
        positions = slots[None] if key_mask is None else (key_mask.long().cumsum(-1) - 1).clamp(min=0)
        return positions if first is None else positions + first[:, None]
    bounds = cu_seqlens.to(device)
    row, since_start = sequence_of(bounds, slots)
    if key_mask is not None:
        counts = torch.nn.functional.pad(key_mask.long().cumsum(-1), (1, 0))[0]  # real slots before each
        since_start = (counts[1:] - counts[bounds.long()[row]] - 1).clamp(min=0)
    return (since_start if first is None else since_start + first[row])[None]
