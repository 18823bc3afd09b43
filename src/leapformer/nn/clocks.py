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


class Angles(NamedTuple):
    """Angles of ``queries`` [B, T, H, m] and of ``keys`` [B, S, G, m], float32 or better; and where the clocks stand
    behind them, float64 and modulo a full turn: ``clock`` of keys [B or N, G, m], in cross-attention ``query_clock`` [B
    or N, H, m]."""

    queries: Tensor
    keys: Tensor
    clock: Tensor
    query_clock: Tensor | None


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

    def forward(
        self,
        k: Tensor,
        q: Tensor | None = None,
        *,
        past: tuple[Tensor | None, Tensor | None] = (None, None),
        places: tuple[Tensor | None, Tensor | None] = (None, None),
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Angles:
        """The clocks of keys k [B, S, G, K], and in cross-attention of queries q [B, T, H, K], both already ReLU'd.

        past: where the clocks of keys, and of queries, stood; None: at 0. places: proportions [B, T, H] of queries and
        [B, S, G] of keys that are added to the running ones. key_mask: bool [B, S], True = real; padding advances
        nothing. cu_seqlens, cu_seqlens_k: packed sequences of queries and of keys, which start anew.

        Raises ValueError where one of q and the clocks for it is missing.
        """
        if (q is None) != (self.q_steps is None):
            found = "cross=False" if self.q_steps is None else "no queries"
            raise ValueError(f"proportion='running': expected cross=True for cross-attention, got {found}")
        rates = self.log_rates.to(torch.float64).exp()
        keys, clock = _read(self.k_steps(k), rates, past[0], key_mask, cu_seqlens_k)
        repeats = self.num_heads // self.num_kv_heads
        of_queries = rates if repeats == 1 else rates.repeat_interleave(repeats, 0)
        if q is None or self.q_steps is None:
            queries, query_clock = keys if repeats == 1 else keys.repeat_interleave(repeats, 2), None
        else:
            queries, query_clock = _read(self.q_steps(q), of_queries, past[1], None, cu_seqlens)
        return Angles(_turned(queries, places[0], of_queries), _turned(keys, places[1], rates), clock, query_clock)


def _turned(angles: Tensor, places: Tensor | None, rates: Tensor) -> Tensor:
    """Angles [B, T, heads, m] and what places [B, T, heads] turn them by."""
    return angles if places is None else angles + places[..., None] * rates.to(angles.dtype)


def _read(
    steps: Tensor, rates: Tensor, past: Tensor | None, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(angles, clock) from steps [B, T, heads] and rates float64 [heads, m].

    Sums are in float64, and what goes on is within a full turn: the millionth token's angle is as exact as the first.
    """
    T, dtype = steps.shape[1], torch.promote_types(steps.dtype, torch.float32)
    if key_mask is not None:
        steps = steps.masked_fill(~key_mask[..., None], 0)
    steps, row = steps.to(torch.float64), None
    sums = steps if T == 1 else steps.cumsum(1)
    if cu_seqlens is not None:
        row, _ = sequence_of(cu_seqlens, torch.arange(T, device=steps.device))
        before = F.pad(sums, (0, 0, 1, 0))[0, cu_seqlens.to(torch.int64)]
        sums = sums - before[row]
    if past is None:
        turned = sums[..., None] * rates
    else:
        turned = torch.addcmul(past[:, None] if row is None else past[row], sums[..., None], rates)
    turned = torch.remainder(turned, FULL_TURN)
    return turned.to(dtype), _last(turned, past, cu_seqlens)


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
