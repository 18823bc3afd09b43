"""Position vectors added to the embeddings. Letters: B batch, T tokens, D hidden size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, computed on the fly for any length (arXiv 1706.03762, sec. 3.5); no
    weights.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f"SinusoidalPositions: expected an even hidden_size, got {hidden_size}")
        self.hidden_size = hidden_size

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids int64 [B, T] -> float32 [B, T, D]: the sines, then the cosines."""
        half = self.hidden_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=position_ids.device) / max(half - 1, 1)
        angles = position_ids[..., None].to(torch.float32) * torch.exp(-math.log(10000.0) * exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class LearnedPositions(nn.Module):
    """One learned vector for each of ``max_positions`` positions."""

    def __init__(self, max_positions: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_positions, hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids int64 [B, T] -> [B, T, D]."""
        return self.embedding(position_ids)
