"""Attention written out, for the tests of the mechanisms. Letters: B batch, T queries, S keys, H heads, K head
width.
"""

import torch
from torch import Tensor


def heads(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Random float64 numbers."""
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, T, H, K], k [B, S, H, K] -> q . k / sqrt(K), [B, H, T, S]."""
    return torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, H, T, S], v [B, S, H, K] -> [B, T, H, K]."""
    return torch.einsum("bhts,bshk->bthk", weights, v)


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax attention; seen: bool, broadcast to [B, H, T, S]."""
    found = scores(q, k)
    return weighted((found if seen is None else found.masked_fill(~seen, -torch.inf)).softmax(-1), v)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
