"""Learned decays of a state, which depend on the token. Letters: B batch, T tokens, D hidden size, H heads, K head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DecayPer = Literal["head", "channel"]
START = 4.0  # sigmoid(4): 98 % are kept a token
CHANNEL_RANK = 16


def check_scales(scales: Sequence[float] | None) -> None:
    """Refuse what isn't None or (shortest, longest)."""
    if scales is not None and not (len(scales) == 2 and 0 < scales[0] <= scales[1] < math.inf):
        raise ValueError(f"decay_scales: expected (shortest, longest) in tokens, 0 < shortest <= longest, got {scales}")


def start_of(scales: Sequence[float] | None, number: int) -> Tensor:
    """The biases [number] with which decays start, see ``Decay``."""
    if scales is None:
        return torch.full((number,), START)
    shortest, longest = scales
    times = shortest * (longest / shortest) ** torch.linspace(0, 1, number)
    return -torch.expm1(1 / times).log()  # logsigmoid(b) = -1 / time


class Decay(nn.Module):
    """log_decay = logsigmoid(W x + b) per head.

    At the start b = 4, so that the state keeps 98 % a token; or, with ``scales`` = (shortest, longest), what is kept
    falls to 1/e in times between these, in tokens and in equal ratios over the heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, scales: Sequence[float] | None = None) -> None:
        super().__init__()
        check_scales(scales)
        self.scales = scales
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.bias.copy_(start_of(self.scales, len(self.bias)))

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, H] <= 0; padding doesn't decay."""
        log_decay = F.logsigmoid(F.linear(x, self.weight, self.bias))
        return log_decay if key_mask is None else log_decay.masked_fill(~key_mask[..., None], 0)


class ChannelDecay(nn.Module):
    """log_decay = logsigmoid(W2 W1 x + b) per channel of every head's keys, of rank 16 (arXiv 2312.06635, sec. 4.4,
    without its exponent of 1 / 16, in place of which b starts high).

    b starts as in ``Decay``, with ``scales`` in equal ratios over the channels of each head.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, *, scales: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_scales(scales)
        self.scales = scales
        self.down = nn.Parameter(torch.empty(CHANNEL_RANK, hidden_size))
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, CHANNEL_RANK))
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.bias.copy_(start_of(self.scales, self.bias.shape[1]))

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, H, K] <= 0; padding doesn't decay."""
        score = F.linear(F.linear(x, self.down), self.weight, self.bias.flatten())
        log_decay = F.logsigmoid(score).unflatten(-1, self.bias.shape)
        return log_decay if key_mask is None else log_decay.masked_fill(~key_mask[..., None, None], 0)
