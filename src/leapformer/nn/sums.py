"""Attention whose past is two sums, with a size that doesn't depend on the length: what its mechanisms share step by
step.

Letters: B batch, n keys, G key/value heads, H query heads, R rank of the re-weighting, K head width, F feature width, M
chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.nn.layer import AttentionLayer
from leapformer.nn.state import LayerState
from leapformer.ops import LinearState, linear_state


class SummingAttention(AttentionLayer):
    """Linear attention of any features. A mechanism writes ``attend``, ``key_features`` and ``query_features``.

    Attributes:
        eps: the clamp of the normaliser. rank: R. feature_width: F. has_decay: a state for every query head, which
            fades. own_states: a state for every query head, also where none fades.
    """

    eps: float
    feature_width: int
    rank: int = 1
    has_decay: bool = False
    own_states: bool = False

    @property
    def state_heads(self) -> int:
        """Heads of a state: G, or H."""
        return self.num_heads if self.has_decay or self.own_states else self.num_kv_heads

    def key_features(self, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """k [B, n, G, K] at ``places`` int64 [B or 1, n] -> features [B, n, G, F], factors [B, n, G or 1, R] or
        None.
        """
        raise NotImplementedError

    def query_features(self, q: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for q [B, T, H, K] at ``position_ids`` int64 [B or 1, T]."""
        raise NotImplementedError

    def next_keys(
        self, k: Tensor, places: Tensor, state: LayerState, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``key_features`` of keys that come after ``state``; what a mechanism counts over keys goes on there."""
        return self.key_features(k, places)

    def next_queries(self, q: Tensor, position_ids: Tensor, state: LayerState) -> tuple[Tensor, Tensor | None]:
        """``query_features`` of queries that come after ``state``, which stays as it is."""
        return self.query_features(q, position_ids)

    def placed(self, phi: Tensor, places: Tensor) -> Tensor:
        """Features [B, n, H or G, F] of self-attention, as they are multiplied at ``places`` int64 [B or 1, n]."""
        return phi

    def _prefix_state(self, k: Tensor, v: Tensor) -> LayerState:
        state = LayerState(length=k.new_zeros(0))
        places = torch.arange(k.shape[1], device=k.device)[None]
        phi, factors = self.next_keys(k, places, state, None)
        linear = self._sums(self.placed(phi, places), v, factors, None, None)
        if self.has_decay:
            linear = linear._replace(log_decay=linear.z.new_zeros(linear.z.shape[:2]))
        state.linear = linear
        return state

    def _empty_state(self, rows: Tensor, *, keep_mass: bool) -> LayerState:
        linear = LinearState.zeros(
            len(rows),
            self.state_heads,
            self.rank,
            self.feature_width,
            self.head_dim,
            dtype=torch.promote_types(rows.dtype, torch.float32),
            device=rows.device,
            decay_heads=self.num_heads if self.has_decay else None,
        )
        chunks = linear.z[:, None, : self.num_kv_heads][:, :0] if keep_mass else None
        return LayerState(length=rows.new_zeros(0), linear=linear, chunk_keys=chunks)

    def _absorb(
        self, k: Tensor, v: Tensor, state: LayerState, *, first: Tensor, key_mask: Tensor | None, chunk: int
    ) -> None:
        assert state.linear is not None
        places = first[:, None] + torch.arange(k.shape[1], device=k.device)
        phi, factors = self.next_keys(k, places, state, key_mask)
        past = state.linear
        linear = self._sums(phi, v, factors, key_mask, past._replace(log_decay=None))
        state.linear = linear._replace(log_decay=past.log_decay)
        if state.chunk_keys is not None:
            state.chunk_keys = _add_to_chunks(state.chunk_keys, phi, factors, key_mask, places // chunk)

    def _mass(self, q: Tensor, state: LayerState, *, position_ids: Tensor, chunk: int) -> Tensor:
        """q . z_c / q . z, z_c the sum of the keys of a chunk; a chunk whose weights sum up to less than 0 has none."""
        assert state.chunk_keys is not None
        phi, factors = self.next_queries(q, position_ids, state)
        phi = phi[..., None, :].to(torch.promote_types(q.dtype, torch.float32))
        phi = (phi if factors is None else phi * factors[..., None])[:, 0]
        keys = state.chunk_keys.repeat_interleave(self.num_heads // self.num_kv_heads, 2)
        mass = torch.einsum("bhrk,bmhrk->bhm", phi, keys).clamp(min=0)
        return mass / mass.sum(-1, keepdim=True).clamp(min=self.eps)

    def _sums(
        self, phi: Tensor, v: Tensor, factors: Tensor | None, key_mask: Tensor | None, past: LinearState | None
    ) -> LinearState:
        """Sums over keys that do not fade, for every head of a state."""
        repeats = self.state_heads // self.num_kv_heads
        if repeats > 1:
            phi, v = phi.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
            if factors is not None and factors.shape[2] > 1:
                factors = factors.repeat_interleave(repeats, 2)
        return linear_state(phi, v, factors, key_mask=key_mask, initial_state=past)


def _add_to_chunks(keys: Tensor, phi: Tensor, factors: Tensor | None, key_mask: Tensor | None, chunk: Tensor) -> Tensor:
    """``keys`` [B, M, G, R, F] with the features of further keys added to the chunks int64 [B, n] that they belong
    to.
    """
    B, n = phi.shape[:2]
    phi = phi[..., None, :].to(keys.dtype)
    if factors is not None:
        phi = phi * factors[..., None]
    if key_mask is not None:
        phi, chunk = phi.masked_fill(~key_mask[..., None, None, None], 0), chunk.masked_fill(~key_mask, 0)
    more = max(int(chunk.max()) + 1 - keys.shape[1], 0)
    rows = torch.arange(B, device=phi.device)[:, None].expand(B, n)
    return F.pad(keys, (0, 0, 0, 0, 0, 0, 0, more)).index_put((rows, chunk), phi, accumulate=True)
