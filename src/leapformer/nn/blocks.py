"""Transformer blocks around an attention layer: norm first, then attention or feed-forward, then the sum.

Letters: B batch, T tokens, S context tokens, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.layer import AttentionLayer
from leapformer.nn.state import LayerState
from leapformer.ops.api import Visible

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class FeedForward(nn.Module):
    """W2 act(W1 x), with dropout after the activation."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str = "gelu", dropout: float = 0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(F.dropout(self.activation(self.up_proj(x)), self.dropout, self.training))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); every token sees every token unless told otherwise.

    Args:
        attention: from ``build_attention``.
        hidden_size, intermediate_size: D and the width of the feed-forward.
        cross_attention: a second attention over a context, between the two (decoders of translation).
        activation: "gelu", "relu" or "silu". dropout: after each part; activation_dropout: inside the feed-forward.
    """

    default_visible: Visible = "all"

    def __init__(
        self,
        attention: AttentionLayer,
        *,
        hidden_size: int,
        intermediate_size: int,
        cross_attention: AttentionLayer | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.attention = attention
        self.cross_norm = None if cross_attention is None else nn.LayerNorm(hidden_size, eps=norm_eps)
        self.cross_attention = cross_attention
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.feed_forward = FeedForward(
            hidden_size, intermediate_size, activation=activation, dropout=activation_dropout
        )
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        visible: Visible | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        context_visible: Visible = "all",
        context_mask: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, T, D] -> (y [B, T, D], state of the self-attention); keywords as in ``AttentionLayer.forward``.

        ``context`` [B, S, D] with its visibility, mask and packing goes to the cross-attention.
        """
        y, kept = self.attention(
            self.attention_norm(x),
            visible=self.default_visible if visible is None else visible,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            state=state,
            return_state=return_state,
        )
        x = x + F.dropout(y, self.dropout, self.training)
        if self.cross_attention is not None and self.cross_norm is not None:
            if context is None:
                raise ValueError("block with cross-attention: expected a context [B, S, D], got None")
            y, _ = self.cross_attention(
                self.cross_norm(x),
                context,
                visible=context_visible,
                key_mask=context_mask,
                cu_seqlens=cu_seqlens,
                cu_seqlens_k=cu_seqlens_k,
                position_ids=position_ids,
            )
            x = x + F.dropout(y, self.dropout, self.training)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + F.dropout(y, self.dropout, self.training), kept


class DecoderBlock(EncoderBlock):
    """An ``EncoderBlock`` that is causal unless told otherwise."""

    default_visible: Visible = "causal"

    def step(
        self, x: Tensor, own: LayerState, source: LayerState, *, position_ids: Tensor, mass_of: int | None = None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """One token x [B, 1, D] in evaluation, with the source behind a state: what ``forward`` computes.

        Args:
            own: the state of the self-attention. source: that of the cross-attention, after ``absorb``; it goes on in
                place.
            position_ids: int64 [B, 1]. mass_of: places of a chunk of the source; None: no mass.

        Returns:
            (y [B, 1, D], the new ``own``, the share of the attention that each chunk of the source has [B, H, chunks]
            or None).
        """
        assert self.cross_attention is not None and self.cross_norm is not None
        y, kept = self.attention(
            self.attention_norm(x), visible="causal", position_ids=position_ids, state=own, return_state=True
        )
        assert kept is not None
        x = x + y
        y, mass = self.cross_norm(x), None
        if mass_of is not None:
            mass = self.cross_attention.mass(y, source, position_ids=position_ids, chunk=mass_of)
        x = x + self.cross_attention.read(y, source, position_ids=position_ids)
        return x + self.feed_forward(self.feed_forward_norm(x)), kept, mass
