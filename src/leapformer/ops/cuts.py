"""Sequences cut into chunks, over which a state runs: what operators with a recurrence of their own share.

Letters: B batch, T tokens, N packed sequences, H heads, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops.checks import expect
from leapformer.ops.state import LinearState


class Cut(NamedTuple):
    """Where each token stands. A packed sequence begins a chunk of its own, so that there are at most T / C + N.

    Attributes:
        size: C. tokens: T. chunks: n.
        slots: int64 [n, C], the token of each slot of packed sequences; real: bool [n, C], whether it is one. place:
            int64 [T], the slot of each token. begins: bool [n], whether a sequence does; row: int64 [n], which one.
            last: int64 [N], the last chunk of each sequence, -1 where it has no token. None where nothing is packed.
    """

    size: int
    tokens: int
    chunks: int
    slots: Tensor | None = None
    real: Tensor | None = None
    place: Tensor | None = None
    begins: Tensor | None = None
    row: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def of(cls, tokens: int, longest: int, cu_seqlens: Tensor | None) -> Cut:
        """Chunks of at most ``longest``; nothing is read from ``cu_seqlens``, which may be on a GPU."""
        C = min(longest, max(tokens, 1))
        if cu_seqlens is None:
            return cls(C, tokens, -(-tokens // C))
        bounds = cu_seqlens.to(torch.int64)
        N, device = bounds.shape[0] - 1, bounds.device
        n = tokens // C + N
        counts = (bounds.diff() + C - 1) // C
        first = F.pad(counts.cumsum(0), (1, 0))
        chunk = torch.arange(n, device=device)
        row = torch.searchsorted(first[1:].contiguous(), chunk, right=True).clamp(max=N - 1)
        since = (chunk - first[row])[:, None] * C + torch.arange(C, device=device)
        real = since < bounds.diff()[row][:, None]
        slots = torch.where(real, bounds[row][:, None] + since, 0)
        token = torch.arange(tokens, device=device)
        of_token = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
        place = first[of_token] * C + token - bounds[of_token]
        last = torch.where(counts > 0, first[1:] - 1, -1)
        return cls(C, tokens, n, slots, real, place, chunk == first[row], row, last)

    def cut(self, x: Tensor) -> Tensor:
        """x [B, T, H, ...] -> [B, H, n, C, ...], zeros where no token is."""
        if self.slots is None or self.real is None:
            padding = [0, 0] * (x.dim() - 2) + [0, self.chunks * self.size - self.tokens]
            x = F.pad(x, padding).unflatten(1, (self.chunks, self.size))
        elif self.tokens:
            real = self.real.reshape(1, *self.real.shape, *[1] * (x.dim() - 2))
            x = x[:, self.slots].masked_fill(~real, 0)
        else:
            x = x.new_zeros(1, *self.slots.shape, *x.shape[2:])
        return x.movedim(3, 1)

    def join(self, y: Tensor) -> Tensor:
        """The reverse: y [B, H, n, C, ...] -> [B, T, H, ...]."""
        y = y.movedim(1, 3).flatten(1, 2)
        return y[:, : self.tokens] if self.place is None else y[:, self.place]

    def run(self, state: Tensor, parts: Sequence[Tensor], step: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """``step(state, *parts of the chunk)`` over all chunks, from ``state`` [B or N, H, ...].

        parts: each [B or 1, H or 1, n, ...]; taken apart at once, since the gradient of one chunk taken out by its
        number is as large as all.

        Returns:
            The state before each chunk [B, H, n, ...], and the last of each row or sequence [B or N, H, ...].
        """
        initial, before, after = state, [], []
        first = None if self.row is None else initial.index_select(0, self.row).split(1)
        for i, of_chunk in enumerate(zip(*(part.unbind(2) for part in parts), strict=True)):
            if first is not None and self.begins is not None:
                state = first[i] if i == 0 else torch.where(self.begins[i], first[i], state)
            before.append(state)
            state = step(state, *of_chunk)
            after.append(state)
        if not before:
            return state[:1].unsqueeze(2)[:, :, :0], initial
        if self.last is None:
            return torch.stack(before, 2), state
        there = (self.last >= 0).reshape(-1, *[1] * (initial.dim() - 1))
        return torch.stack(before, 2), torch.where(there, torch.cat(after)[self.last.clamp(min=0)], initial)


def hidden(x: Tensor, key_mask: Tensor) -> Tensor:
    """x [B, T, ...] with zeros at padding."""
    return x.masked_fill(~key_mask.reshape(*key_mask.shape, *[1] * (x.dim() - 2)), 0)


def first_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> LinearState:
    """The state of an empty past for q [B, T, H, K] and v [B, T, G, V], one for each row or packed sequence."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return LinearState.zeros(rows, q.shape[2], 1, q.shape[3], v.shape[3], dtype=dtype, device=q.device)


def check_rows(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Refuse what isn't causal self-attention of q [B, T, H, K] with k [B, T, G, K] and v [B, T, G, V]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.dim() == 4 and x.is_floating_point(), name, "a floating [batch, tokens, heads, width]", x.shape)
    B, T, H, K = q.shape
    G = k.shape[2]
    expect(k.shape[:2] == (B, T) and k.shape[3] == K, "k", "[{}, {}, G, {}]", k.shape, B, T, K)
    expect(G > 0 and H % G == 0, "k", "a number of heads that divides {}", G, H)
    expect(v.shape[:3] == k.shape[:3], "v", "[{}, {}, {}, V]", v.shape, B, T, G)
    if key_mask is not None:
        ok = key_mask.dtype == torch.bool and key_mask.shape == (B, T)
        expect(ok, "key_mask", "bool [{}, {}]", f"{key_mask.dtype} {list(key_mask.shape)}", B, T)
    if cu_seqlens is not None:
        ok = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 2
        expect(ok, "cu_seqlens", "[N + 1], N >= 1", cu_seqlens.shape)
        expect(B == 1, "cu_seqlens", "a batch of 1", B)


def check_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state: LinearState | None) -> None:
    """Refuse a state that isn't one of q [B, T, H, K] and v [B, T, G, V]."""
    if state is None:
        return
    rows, (H, K), V = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, q.shape[2:], v.shape[3]
    kv, z = state.kv, state.z
    fits = kv.dim() == 5 and (*kv.shape[:2], kv.shape[2] * kv.shape[3], kv.shape[4]) == (rows, H, K, V)
    expect(fits, "initial_state.kv", "[{}, {}, R, {} / R, {}]", kv.shape, rows, H, K, V)
    expect(z.shape == kv.shape[:-1], "initial_state.z", "{}", z.shape, list(kv.shape[:-1]))
