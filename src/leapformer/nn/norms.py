"""Norms of queries, keys and outputs of one head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNIT_EPS = 1e-6


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x) in the dtype of x, computed in that of the norm's weight: under autocast the two differ."""
    wanted = getattr(norm, "weight", x).dtype
    return norm(x.to(wanted)).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """x [..., K] with a length just below 1, x / sqrt(|x|^2 + UNIT_EPS), float32 or better; zeros stay zeros."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()
