"""Queries and keys of a chunk under a decay: what a causal recurrence makes of them.

The weight of key j for query t is sum over channels of q_t k_j exp(g_t - g_j), g the running sum of log decays. With
one decay a head that is a product of weights and of what is left between two tokens. By channels, within a chunk of 16
tokens, it is a product of q exp(g) and k exp(-g): in float64, and with a step that counts as no less than -40, the
latter stays within its range, and every product is as exact as float64 has it (arXiv 2312.06635, sec. 4, has a second
level of chunks for that).

Letters: B batch, H heads, n chunks, C tokens of a chunk, K key width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leapformer.ops.decay import running_sum

CHUNK = 64
CHANNEL_CHUNK = 16
LEAST = -40.0  # of a step by channels: exp(-40) is 4e-18, and 16 of them are within float64


class Faded(NamedTuple):
    """What is left of queries and keys [B, H, n, C, K].

    Attributes:
        seen: [B, H, n, C, C], the weight of each key for each query, 0 for later keys. held: that of each key for each
            key, of which the delta rule looks below the diagonal.
        q, k: as they meet the state before the chunk. to_end: keys as they enter the one after it.
        left: [B, H, n, K or 1, 1], what is left of the former in the latter.
    """

    seen: Tensor
    held: Tensor
    q: Tensor
    k: Tensor
    to_end: Tensor
    left: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, log_decay: Tensor | None) -> Faded:
        """log_decay: [B, H, n, C], [B, H, n, C, K], or None where nothing fades."""
        if log_decay is None:
            return cls((q @ k.mT).tril(), k @ k.mT, q, k, k, q.new_ones(1, 1, q.shape[2], 1, 1))
        if log_decay.dim() == q.dim():
            return cls.by_channel(q, k, log_decay)
        sums = running_sum(log_decay, -1, k.dtype)
        between = sums[..., :, None] - sums[..., None, :]
        later = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        kept = between.masked_fill(later, -torch.inf).exp().to(k.dtype)  # exactly 0 of what comes later
        since = sums.exp().to(k.dtype)[..., None]
        to_end = k * (sums[..., -1:] - sums).exp().to(k.dtype)[..., None]
        return cls((q @ k.mT) * kept, (k @ k.mT) * kept, q * since, k * since, to_end, since[..., -1:, :])

    @classmethod
    def by_channel(cls, q: Tensor, k: Tensor, log_decay: Tensor) -> Faded:
        """log_decay: [B, H, n, C, K], C at most ``CHANNEL_CHUNK``."""
        dtype, sums = k.dtype, log_decay.to(torch.float64).clamp(min=LEAST).cumsum(-2)
        since, last = sums.exp(), sums[..., -1:, :]
        before = (k * (-sums).exp()).mT
        q, k, to_end = q * since, k * since, k * (last - sums).exp()
        seen, held = (q @ before).tril(), (k @ before).tril()
        return cls(*(x.to(dtype) for x in (seen, held, q, k, to_end, last.mT.exp())))
