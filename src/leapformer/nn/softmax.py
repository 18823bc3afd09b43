"""Softmax attention with the interface of the linear layers: the yardstick.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.layer import AttentionLayer, Call, Capabilities, Mechanism, Shared
from leapformer.nn.norms import normed
from leapformer.nn.packing import sequence_of
from leapformer.nn.rotary import ROTARY_BASE, check_rotary, turned
from leapformer.nn.state import LayerState
from leapformer.ops import Staircase


class SoftmaxAttention(AttentionLayer):
    """softmax(q k^T / sqrt(K)) v through PyTorch's scaled_dot_product_attention (arXiv 1706.03762, eq. 1).

    Dropout is on the attention weights. The state keeps all keys and values, so it grows; its keys are normed and
    turned already. A query that sees no key gets 0.

    Args:
        qk_norm: RMSNorm of every head's query and key, with a learned scale [K] for each of the two: scores of vectors
            of length 1 would lie within 1 / sqrt(K), and softmax would hardly choose (arXiv 2302.05442, sec. 2; as
            RMSNorm arXiv 2505.09388).
        rotary, rotary_base: turn queries and keys of self-attention by their positions, see ``nn.rotary``. Over a
            source nothing is turned: places of a source and of a target are on no common scale.
        The others as in ``AttentionLayer``.

    Raises:
        ValueError: also rotary positions with an odd head_dim.
    """

    capabilities = Capabilities(causal=True, cross=True, streaming=False, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        rotary: bool = False,
        rotary_base: float = ROTARY_BASE,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None for _ in range(2))
        self.rotary_base = check_rotary(self.head_dim, rotary_base) if rotary else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call) -> tuple[Tensor, LayerState | None]:
        q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        if self.rotary_base is not None and call.is_self:
            places = call.places(q)
            q, k = (turned(one, places, self.rotary_base) for one in (q, k))
        state, visible, key_mask = call.state, call.visible, call.key_mask
        if call.cu_seqlens is not None and call.stateful:
            raise ValueError("softmax attention: expected no state with cu_seqlens (its cache has one row a sequence)")
        past, new_keys, B = 0, k.shape[1], k.shape[0]
        if state is not None and state.keys is not None and state.values is not None:
            past = state.keys.shape[1]
            k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
            if key_mask is not None or state.key_mask is not None:
                new = _all_real(B, new_keys, k) if key_mask is None else key_mask
                key_mask = torch.cat([_all_real(B, past, k) if state.key_mask is None else state.key_mask, new], dim=1)
        named = visible if isinstance(visible, str) else None
        plain_causal = named == "causal" and past == 0
        sees_all = named == "all" or (named == "causal" and q.shape[1] == new_keys == 1)
        mask = None
        if key_mask is not None or call.cu_seqlens is not None or not (plain_causal or sees_all):
            mask = _visible_mask(q, k, call._replace(key_mask=key_mask), past)
        output = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=plain_causal and mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        ).transpose(1, 2)
        if mask is not None:
            output = output.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0)
        if not call.return_state:
            return output, None
        return output, LayerState(length=q.new_zeros(0), keys=k, values=v, key_mask=key_mask)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        return x if norm is None else normed(norm, x)

    def _prefix_state(self, k: Tensor, v: Tensor) -> LayerState:
        k = self._normed(k, self.k_norm)
        if self.rotary_base is not None:
            k = turned(k, torch.arange(k.shape[1], device=k.device)[None], self.rotary_base)
        return LayerState(length=k.new_zeros(0), keys=k, values=v)

    def _empty_state(self, rows: Tensor, *, keep_mass: bool) -> LayerState:
        keys, values = (rows.new_zeros(len(rows), 0, self.num_kv_heads, self.head_dim) for _ in range(2))
        return LayerState(length=rows.new_zeros(0), keys=keys, values=values)

    def _absorb(
        self, k: Tensor, v: Tensor, state: LayerState, *, first: Tensor, key_mask: Tensor | None, chunk: int
    ) -> None:
        state.append(self._normed(k, self.k_norm), v, key_mask)

    def _mass(self, q: Tensor, state: LayerState, *, position_ids: Tensor, chunk: int) -> Tensor:
        """The weights summed up over each chunk."""
        assert state.keys is not None
        q = self._normed(q, self.q_norm)
        k = state.keys.repeat_interleave(self.num_heads // self.num_kv_heads, 2)
        scores = torch.einsum("bhk,bshk->bhs", q[:, 0], k) * self.head_dim**-0.5
        real = torch.ones_like(scores[:, 0], dtype=torch.bool) if state.key_mask is None else state.key_mask
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~real[:, None], -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0)  # a row that has seen nothing
        place = (real.long().cumsum(1) - 1).clamp(min=0) // chunk
        chunks = int(place.max()) + 1 if place.numel() else 0
        return weights.new_zeros(*weights.shape[:2], chunks).scatter_add(2, place[:, None].expand_as(weights), weights)


MECHANISM = Mechanism(
    name="softmax",
    layer=SoftmaxAttention,
    label="softmax",
    row=0,
    options={name: name for name in ("qk_norm", "rotary", "rotary_base")},
    translates=True,
)


def _all_real(B: int, S: int, like: Tensor) -> Tensor:
    return torch.ones(B, S, dtype=torch.bool, device=like.device)


def _visible_mask(q: Tensor, k: Tensor, call: Call, past: int) -> Tensor:
    """bool [B or 1, 1, T, S], True where the query sees the key; every query sees the ``past`` keys of the state."""
    visible, key_mask, cu_seqlens, cu_seqlens_k = call.visible, call.key_mask, call.cu_seqlens, call.cu_seqlens_k
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    queries, keys = torch.arange(T, device=q.device), torch.arange(S - past, device=q.device)
    mask = torch.ones(1, T, S - past, dtype=torch.bool, device=q.device)
    rows = torch.zeros_like(queries)
    if cu_seqlens is not None:
        rows, queries = sequence_of(cu_seqlens, queries)
        key_rows, keys = sequence_of(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, keys)
        mask = (rows[:, None] == key_rows[None])[None]
    if isinstance(visible, str):
        counts = queries[None] + 1 if visible == "causal" else None
    else:
        counts = visible.at(queries[None], S) if isinstance(visible, Staircase) else visible
    if counts is not None:
        if cu_seqlens is not None and counts.shape[0] > 1:  # a staircase for each packed sequence
            counts = counts[rows, torch.arange(T, device=q.device)][None]
        mask = mask & (keys < counts[..., None])
    if past:
        mask = torch.cat([torch.ones(*mask.shape[:2], past, dtype=torch.bool, device=q.device), mask], dim=-1)
    if key_mask is not None:
        mask = mask & key_mask[:, None]
    return mask[:, None].expand(-1, 1, T, S) if mask.shape[0] in (1, B) else mask[:, None]
