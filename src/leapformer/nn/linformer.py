"""Linformer. Letters: B batch, T queries, S keys, H heads, K head width, M projected length, N longest length."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.bidirectional import BidirectionalAttention, SharedBidirectional
from leapformer.nn.layer import Capabilities, Mechanism


class LinformerAttention(BidirectionalAttention):
    """softmax(q (E k)^T / sqrt(K)) (F v), E and F [M, N] learned and shared by the heads (arXiv 2006.04768, eq. 7).

    A shorter sequence uses the first columns of E and F, and padding counts as zeros, so it changes nothing. Dropout is
    on the attention weights.

    Args:
        num_features: M. max_positions: N, a limit. The others as in ``BidirectionalAttention``.
    """

    name = "linformer"
    capabilities = Capabilities(causal=False, cross=True, streaming=False, arbitrary_length=False)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_features: int = 128,
        max_positions: int = 2048,
        **shared: Unpack[SharedBidirectional],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.max_positions = max_positions
        self.key_projection = nn.Parameter(torch.empty(num_features, max_positions))
        self.value_projection = nn.Parameter(torch.empty(num_features, max_positions))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Variance 1 / M, as in the Johnson-Lindenstrauss projections of the paper's theorem 2."""
        for projection in (self.key_projection, self.value_projection):
            nn.init.normal_(projection, std=projection.shape[0] ** -0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        S = k.shape[1]
        if S > self.max_positions:
            raise ValueError(
                f"linformer attention: expected at most max_positions={self.max_positions} tokens, got {S}; its "
                "projections have that length"
            )
        if mask is not None:
            k, v = (x.masked_fill(~mask[:, :, None, None], 0) for x in (k, v))
        k = torch.einsum("ms,bshk->bhmk", self.key_projection[:, :S], k)
        v = torch.einsum("ms,bshk->bhmk", self.value_projection[:, :S], v)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, dropout_p=dropout).transpose(1, 2)


MECHANISM = Mechanism(
    name=LinformerAttention.name,
    layer=LinformerAttention,
    label="Linformer",
    options={"num_features": "attention_features", "max_positions": "max_position_embeddings", "seed": None},
    limit="Linformer's projections have the length {field}",
    weights=lambda given: 2 * given["num_features"] * given["max_positions"],
)
