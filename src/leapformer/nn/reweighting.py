"""Re-weightings: functions sigma(a, b) of two proportions that split into a sum of products f_r(a) g_r(b).

Letters: B batch, T tokens, H heads, R rank. A proportion p [B, T, H] gives factors [B, T, H, R].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from leapformer.ops import cosine_factors


class Reweighting(Protocol):
    """Proportions in, factors out: sigma(a, b) = sum_r factors_q(a)_r factors_k(b)_r >= 0 for a, b in [0, 1]."""

    rank: int

    def factors_q(self, p: Tensor) -> Tensor: ...

    def factors_k(self, p: Tensor) -> Tensor: ...


class Cosine:
    """cos(pi/2 (a - b)), rank 2 (arXiv 2202.08791, eq. 10; arXiv 2405.13046, eq. 7)."""

    rank = 2

    def factors_q(self, p: Tensor) -> Tensor:
        return cosine_factors(p)

    def factors_k(self, p: Tensor) -> Tensor:
        return cosine_factors(p)


class Quadratic:
    """1 - (a - b)^2 = (1 - a^2) 1 + 2a b + 1 (-b^2), rank 3: falls off faster than the cosine near a = b."""

    rank = 3

    def factors_q(self, p: Tensor) -> Tensor:
        return torch.stack([1 - p * p, 2 * p, torch.ones_like(p)], dim=-1)

    def factors_k(self, p: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(p), p, -p * p], dim=-1)


REWEIGHTINGS: dict[str, type[Cosine] | type[Quadratic]] = {"cosine": Cosine, "quadratic": Quadratic}
