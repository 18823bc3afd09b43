"""Norms of queries, keys and outputs of one head."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

UNIT_EPS = 1e-6


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x) in the dtype of x, computed in that of the norm's weight: under autocast the two differ."""
    wanted = getattr(norm, "weight", x).dtype
    return norm(x.to(wanted)).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """x [..., K] with the length 1; what is shorter than ``UNIT_EPS``, such as features of zeros, becomes no longer."""
    return F.normalize(x, dim=-1, eps=UNIT_EPS)
