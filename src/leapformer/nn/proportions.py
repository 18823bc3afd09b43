"""Proportions in [0, 1]: of a token's position (cosFormer), or learned from its query or key (LeaPformer).

Letters: B batch, T tokens, H heads, K head width, r hidden size of the LeaP module.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from leapformer.ops import LeapWeights, proportion

Start = Literal["default", "spread"]

# The cosine is flat where all proportions are near 1/2. "spread" multiplies the usual standard deviation of every layer
# by this, so that proportions differ between tokens from the first step on.
SPREAD_GAIN = 4.0


class Proportion(Protocol):
    """Features [B, T, H, K] in, proportions [B, T, H or 1] out, between 0 and 1: such as a ``LeapModule``."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LeapModule(nn.Module):
    """P = sigmoid(W2 relu(W1 x + b1) + b2), x the ReLU'd query or key of one head (arXiv 2405.13046, sec. 3.2).

    Args:
        head_dim: K.
        hidden: r; 1 means a single linear layer without hidden units, as in the paper.
        heads: 1 shares the module over heads; else one module per head.
        bins: round the proportion to this many equally spaced values, with a straight-through gradient; None: don't.
        start: "default" as torch.nn.Linear, or "spread" (``SPREAD_GAIN`` times that).

    Raises ValueError for hidden, heads < 1, bins < 2 or an unknown start.
    """

    def __init__(
        self, head_dim: int, *, hidden: int = 8, heads: int = 1, bins: int | None = None, start: Start = "default"
    ) -> None:
        super().__init__()
        if hidden < 1 or heads < 1 or (bins is not None and bins < 2):
            raise ValueError(
                f"LeapModule: expected hidden >= 1, heads >= 1, bins >= 2 or None, got {hidden}, {heads}, {bins}"
            )
        if start not in ("default", "spread"):
            raise ValueError(f"LeapModule: expected start 'default' or 'spread', got {start!r}")
        self.bins, self.start = bins, start
        last = head_dim if hidden == 1 else hidden
        self.w1 = nn.Parameter(torch.empty(heads, hidden, head_dim)) if hidden > 1 else None
        self.b1 = nn.Parameter(torch.empty(heads, hidden)) if hidden > 1 else None
        self.w2 = nn.Parameter(torch.empty(heads, last))
        self.b2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gain = SPREAD_GAIN if self.start == "spread" else 1.0
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            if weight is not None and bias is not None:
                bound = 1 / math.sqrt(weight.shape[-1])
                nn.init.uniform_(weight, -gain * bound, gain * bound)
                nn.init.uniform_(bias, -bound, bound)

    def weights(self) -> LeapWeights:
        """The weights as ``leapformer.ops.leap_attention`` takes them."""
        return LeapWeights(self.w1, self.b1, self.w2, self.b2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H, K], already ReLU'd -> proportion [B, T, H], float32 or better."""
        return self.rounded(proportion(x, self.weights()))

    def rounded(self, p: Tensor) -> Tensor:
        """p to ``bins`` values, with a straight-through gradient."""
        if self.bins is None:
            return p
        rounded = torch.round(p * (self.bins - 1)) / (self.bins - 1)
        return p + (rounded - p).detach()


def leap_parameters(head_dim: int, hidden: int) -> int:
    """Parameters of one LeaP module shared over heads."""
    return head_dim + 1 if hidden == 1 else hidden * (head_dim + 2) + 1


def hidden_for_share(share: float, *, parameters: int, modules: int, head_dim: int) -> int:
    """The r whose ``modules`` LeaP modules come nearest to ``share`` (0.002 = 0.2 %) of ``parameters``; at most 4 K."""
    if not 0 < share < 1:
        raise ValueError(f"share of LeaP parameters: expected a number between 0 and 1, got {share}")
    wanted = share * parameters
    return min(range(1, 4 * head_dim + 1), key=lambda r: abs(modules * leap_parameters(head_dim, r) - wanted))


class PositionProportion(nn.Module):
    """cosFormer's P(i) = i / M with i = position + 1, counted from 1 (arXiv 2202.08791, eq. 9)."""

    def __init__(self, max_positions: int) -> None:
        super().__init__()
        if max_positions < 1:
            raise ValueError(f"PositionProportion: expected max_positions >= 1, got {max_positions}")
        self.max_positions = max_positions

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids int64 [B or 1, T] from 0 -> [B or 1, T, 1] float32; past M the cosine would turn negative."""
        if not torch.compiler.is_compiling() and position_ids.numel() and position_ids.device.type == "cpu":
            longest = int(position_ids.max()) + 1
            if longest > self.max_positions:
                raise ValueError(
                    f"cosFormer: expected at most max_positions={self.max_positions} tokens, got {longest}; its "
                    "re-weighting needs the length beforehand (attention='leap' takes any length)"
                )
        return ((position_ids + 1).to(torch.float32) / self.max_positions)[..., None]
