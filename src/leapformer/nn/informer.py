"""Informer. Letters: B batch, T tokens, H heads, K head width, N keys drawn and as many queries chosen."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.nn.bidirectional import BidirectionalAttention, SharedBidirectional, lengths
from leapformer.nn.layer import Capabilities, Mechanism


class InformerAttention(BidirectionalAttention):
    """ProbSparse attention: the c ln n most telling queries get softmax, the others the mean of v (arXiv 2012.07436,
    sec. 3.1).

    How telling a query is, the maximum minus the mean of its scores, is measured on c ln n keys drawn at random, the
    same for all queries. Padding is neither drawn, chosen nor seen, so it changes nothing. Dropout is on the attention
    weights.

    Args:
        num_features: about how many queries of ``max_positions`` are chosen: c = ceil(num_features / ln max_positions).
        max_positions: no limit. The others as in ``BidirectionalAttention``.
    """

    name = "informer"
    capabilities = Capabilities(causal=False, cross=False, streaming=False, arbitrary_length=True)

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
        self.factor = math.ceil(num_features / math.log(max(max_positions, 3)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        real = lengths(mask, k.transpose(1, 2))
        chosen, there = self._telling_queries(q, k, real, mask)
        keys = None if mask is None else mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        exact = F.scaled_dot_product_attention(_rows(q, chosen), k, v, attn_mask=keys, dropout_p=dropout)
        seen = v if mask is None else v.masked_fill(~mask[:, None, :, None], 0)
        mean = seen.sum(2, keepdim=True) / real[:, None, None, None]
        exact = torch.where(there[:, None, :, None], exact, mean)
        y = mean.expand(-1, -1, q.shape[2], -1).scatter(2, chosen[..., None].expand_as(exact), exact)
        return y.transpose(1, 2)

    @torch.no_grad()
    def _telling_queries(self, q: Tensor, k: Tensor, real: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Places int64 [B, H, N] of the chosen queries, and which of the N each sample has, bool [B or 1, N]."""
        many = (self.factor * torch.log1p(real.to(torch.float64)).ceil()).long().minimum(real)
        most = torch.arange(int(many.max()), device=q.device)
        places = (self.random(len(most)).to(q.device) * real[:, None]).long().minimum(real[:, None] - 1)
        scores = (
            q @ _rows(k, places[:, None].expand(q.shape[0], q.shape[1], -1)).transpose(-1, -2) * q.shape[-1] ** -0.5
        )
        used = most < many[:, None]
        largest = scores.masked_fill(~used[:, None, None], -torch.inf).amax(-1)
        telling = largest - scores.masked_fill(~used[:, None, None], 0).sum(-1) / many[:, None, None]
        if mask is not None:
            telling = telling.masked_fill(~mask[:, None], -torch.inf)
        return telling.topk(len(most), dim=-1).indices, used


MECHANISM = Mechanism(
    name=InformerAttention.name,
    layer=InformerAttention,
    label="Informer",
    options={"num_features": "attention_features", "max_positions": "max_position_embeddings", "seed": None},
)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x [B, H, T, K] at places [B, H, N] -> [B, H, N, K]."""
    return x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1]))
