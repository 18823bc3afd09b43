"""Learned proportions that begin with a token's place. Letters: B batch, T tokens, H heads, K head width."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from leapformer.nn.proportions import LeapModule
from leapformer.ops.lowering import leap_score

START_SCALE = 64.0


class PriorProportion(LeapModule):
    """P = sigmoid(s + a log((t + 1) / tau)), s what a LeaP module reads off the token's features, t its place from 0.

    A proportion that is read off the token alone cannot know the place. Here a place is where learning begins: with
    s = 0 and a = 1, P = (t + 1) / (t + 1 + tau), which rises from 0 to 1 as cosFormer's i / M does, without a length. a
    and tau are learned for each head and start at 1 and 64.

    Args: num_heads: H; the others as in ``LeapModule``.
    """

    def __init__(self, head_dim: int, num_heads: int, **leap: Any) -> None:
        super().__init__(head_dim, **leap)
        self.slope = nn.Parameter(torch.empty(num_heads))
        self.log_scale = nn.Parameter(torch.empty(num_heads))
        self._start_prior()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "slope"):  # a LeaP module starts before these are there
            self._start_prior()

    def _start_prior(self) -> None:
        nn.init.constant_(self.slope, 1.0)
        nn.init.constant_(self.log_scale, math.log(START_SCALE))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x [B, T, H, K], already ReLU'd, at ``places`` int64 [B or 1, T] -> proportion [B, T, H], at least float32."""
        score = leap_score(x, self.weights())
        times = (places + 1).to(score.dtype).log()[..., None]
        return self.rounded(torch.sigmoid(score + self.slope * (times - self.log_scale)))
