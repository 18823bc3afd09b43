"""Rotary positions. Letters: B batch, T tokens, H heads, K head width."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10_000.0


def check_rotary(head_dim: int, base: float) -> float:
    """``base``, where it and the head's width will do.

    Raises:
        ValueError: an odd width, or a base below 1.
    """
    if head_dim % 2:
        raise ValueError(f"rotary: expected an even head_dim (numbers are turned in pairs), got {head_dim}")
    if not base >= 1:
        raise ValueError(f"rotary_base: expected at least 1, got {base}")
    return base


def turned(x: Tensor, position_ids: Tensor, base: float = ROTARY_BASE) -> Tensor:
    """x [B, T, H, K] with the pair (i, i + K / 2) turned by position / base^(2 i / K) radians; K is even.

    A product of two turned vectors depends on the difference of their positions int64 [B or 1, T] alone. Angles are in
    float64, so that this holds for any length.

    Source: arXiv 2104.09864, eq. 15 and 34, with the pairs of its first public implementations (halves of the vector).
    """
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = position_ids[..., None, None].to(torch.float64) * rates
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
