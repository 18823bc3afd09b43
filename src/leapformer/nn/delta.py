"""The delta rule as a part of linear attention. Letters: B batch, T tokens, D hidden size, H heads, K head width, R
rank.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Update = Literal["sum", "delta"]


class DeltaRule(nn.Module):
    """beta = reach sigmoid(W x) per head: how much of what the state holds under a key the new value replaces.

    Args:
        reach: 1, or 2, with which a state may also turn its sign (arXiv 2411.12537: what counting and parity need).

    Source: arXiv 2406.06484.

    Raises ValueError for another reach.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, reach: int = 1) -> None:
        super().__init__()
        if reach not in (1, 2):
            raise ValueError(f"delta_range: expected 1 or 2, got {reach}")
        self.reach = reach
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> beta [B, T, H] in (0, reach)."""
        return self.reach * torch.sigmoid(F.linear(x, self.weight))


def spread(x: Tensor, factors: Tensor | None, *, unit: bool = False) -> Tensor:
    """Features x [B, T, H, K] with factors [B, T, H or 1, R] -> [B, T, H, R K]: a product of two such vectors is that
    of the features times that of the factors. ``unit``: with factors of length 1, so that lengths stay.
    """
    if factors is None:
        return x
    factors = (F.normalize(factors, dim=-1) if unit else factors).to(torch.promote_types(x.dtype, factors.dtype))
    return (factors[..., None] * x[..., None, :]).flatten(-2)
