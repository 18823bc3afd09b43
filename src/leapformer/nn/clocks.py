"""Running proportions: clocks that every token advances, whose angles take the place of proportions.

    step_t = sigmoid(MLP(relu(k_t))) in (0, 1)             what a LeaP module reads off one head's key
    Phi_t  = sum over s <= t of step_s                     the running proportion
    sigma(i, j) = sum_m cos(theta_m (Phi_i - Phi_j))       theta learned for each head and clock

A proportion that is read off one token cannot know where in the sequence the token stands. A sum of steps can, and the
steps are learned; it needs no length, and one number of state for each clock. In cross-attention queries and keys have
clocks of their own, which the tokens of the target and of the source advance: an alignment.

Letters: B batch, T tokens, H query heads, G key/value heads, K head width, m clocks of a head, N packed sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.packing import sequence_of
from leapformer.nn.proportions import LeapModule, Start

FULL_TURN = 2 * math.pi


class Reading(NamedTuple):
    """``angles`` [B, T, heads, m] in (-pi, pi], float32 or better, and where the clocks stand behind them, float64
    [B or N, heads, m], modulo a full turn."""

    angles: Tensor
    clock: Tensor


class Clocks(nn.Module):
    """The clocks of one attention layer.

    Args:
        head_dim, num_heads, num_kv_heads: K, H, G. A head's clocks are those of its key head.
        clocks: m.
        rate: theta of the fastest clock at the start, in radians a step: pi/2 does for text, 2 pi where the model has
            to count. decades: the slowest starts this many powers of ten below it, the others in equal ratios.
        cross: for cross-attention: queries advance clocks of their own, at the same rates.
        hidden, per_head, start: of the LeaP modules that give the steps, see ``LeapModule``.

    Raises ValueError for clocks < 1, a rate that is not above 0, or decades below 0.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        clocks: int = 1,
        rate: float = math.pi / 2,
        decades: float = 2.0,
        cross: bool = False,
        hidden: int = 8,
        per_head: bool = False,
        start: Start = "default",
    ) -> None:
        super().__init__()
        if clocks < 1 or not 0 < rate < math.inf or not 0 <= decades < math.inf:
            raise ValueError(
                f"Clocks: expected clocks >= 1, rate > 0, decades >= 0, got {clocks}, {rate} and {decades}"
            )
        self.num_heads, self.num_kv_heads, self.clocks = num_heads, num_kv_heads, clocks
        self.rate, self.decades = rate, decades
        self.log_rates = nn.Parameter(torch.empty(num_kv_heads, clocks))
        self.k_steps = LeapModule(head_dim, hidden=hidden, heads=num_kv_heads if per_head else 1, start=start)
        self.q_steps = None
        if cross:
            self.q_steps = LeapModule(head_dim, hidden=hidden, heads=num_heads if per_head else 1, start=start)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The rates; the modules start by themselves."""
        rates = math.log(self.rate) - math.log(10) * self.decades * torch.linspace(0, 1, self.log_rates.numel())
        with torch.no_grad():
            self.log_rates.copy_(rates.view_as(self.log_rates))

    def of_keys(
        self,
        k: Tensor,
        past: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Reading:
        """The clocks of keys k [B, S, G, K], already ReLU'd, on from ``past`` float64 [B or N, G, m].

        key_mask: bool [B, S], True = real; padding advances nothing. cu_seqlens: packed sequences start anew.
        """
        return _read(self.k_steps(k), self._rates(self.num_kv_heads), past, key_mask, cu_seqlens)

    def of_queries(
        self,
        q: Tensor,
        past: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Reading:
        """Cross-attention: those of queries q [B, T, H, K], on from ``past`` float64 [B or N, H, m]."""
        assert self.q_steps is not None
        return _read(self.q_steps(q), self._rates(self.num_heads), past, key_mask, cu_seqlens)

    def at_places(self, places: Tensor) -> Tensor:
        """What proportions as places [B, T, H or G] turn the clocks by: angles [B, T, H or G, m]."""
        return places[..., None] * self._rates(places.shape[2]).to(places.dtype)

    def for_query_heads(self, angles: Tensor) -> Tensor:
        """[B, T, G, m] -> [B, T, H, m]."""
        repeats = self.num_heads // self.num_kv_heads
        return angles if repeats == 1 else angles.repeat_interleave(repeats, 2)

    def _rates(self, heads: int) -> Tensor:
        """theta [heads, m]."""
        return self.log_rates.exp().repeat_interleave(heads // self.num_kv_heads, 0)


def _read(
    steps: Tensor, rates: Tensor, past: Tensor | None, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Reading:
    """From steps [B, T, heads] and rates [heads, m]. Sums are in float64, and what goes on is within a full turn: the
    millionth token's angle is as exact as the first one's."""
    T, dtype = steps.shape[1], torch.promote_types(steps.dtype, torch.float32)
    if key_mask is not None:
        steps = steps.masked_fill(~key_mask[..., None], 0)
    steps, rates, row = steps.to(torch.float64), rates.to(torch.float64), None
    sums = steps if T == 1 else steps.cumsum(1)
    if cu_seqlens is not None:
        row, _ = sequence_of(cu_seqlens, torch.arange(T, device=steps.device))
        before = F.pad(sums, (0, 0, 1, 0))[0, cu_seqlens.to(torch.int64)]
        sums = sums - before[row]
    turned = sums[..., None] * rates
    if past is not None:
        turned = turned + (past[:, None] if row is None else past[row])
    turned = turned - FULL_TURN * torch.round(turned.detach() / FULL_TURN)
    return Reading(turned.to(dtype), _last(turned, past, cu_seqlens))


def _last(turned: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where the clocks stand behind the last token of each sequence; where there is none, where they stood."""
    B, T, *clocks = turned.shape
    if cu_seqlens is None and T:
        return turned[:, -1]
    stood = turned.new_zeros(B if cu_seqlens is None else len(cu_seqlens) - 1, *clocks) if past is None else past
    if cu_seqlens is None or not T:
        return stood
    last = turned[0, (cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)]
    return torch.where((cu_seqlens.diff() > 0)[:, None, None], last, stood)
