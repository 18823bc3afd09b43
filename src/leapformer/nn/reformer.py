"""Reformer. Letters: B batch, T tokens, H heads, K head width, R rounds of hashing, C chunks, W tokens of a chunk."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.nn.bidirectional import BidirectionalAttention, SharedBidirectional, lengths
from leapformer.nn.layer import Capabilities, Mechanism

NORM_EPS = 1e-6
ALONE = -1e5  # a token looks at itself only where nothing else is seen


class ReformerAttention(BidirectionalAttention):
    """softmax(q . q / |q|) v among tokens that hash alike (arXiv 2001.04451, sec. 2), with queries as keys.

    Every round hashes by random rotations, sorts by bucket, cuts into chunks and looks from a chunk into itself and the
    one before (the first: the last). Rounds are merged by their softmax normalisers. Scores are not divided by sqrt(K),
    as in the authors' code. A sample of n real tokens has 2 (n // W) buckets, at least 2, and padding is sorted to the
    end, so padding changes nothing. Dropout is on the attention weights.

    Args:
        num_hashes: R. block_size: W. The others as in ``BidirectionalAttention``.
    """

    name = "reformer"
    capabilities = Capabilities(causal=False, cross=False, streaming=False, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_hashes: int = 2,
        block_size: int = 64,
        **shared: Unpack[SharedBidirectional],
    ) -> None:
        super().__init__(hidden_size, num_heads, share_qk=True, **shared)
        self.num_hashes, self.block_size = num_hashes, block_size

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, W = q.shape[1], self.block_size
        real = lengths(mask, q)
        q, v = (F.pad(x.transpose(1, 2), (0, 0, 0, -T % W)) for x in (q, v))
        order = self._order(q, real)  # [B, H, R, T]
        # As the authors' length norm: a query of zeros has a key of zeros, and a finite gradient.
        k = q * (q.square().sum(-1, keepdim=True) + NORM_EPS * q.shape[-1]).rsqrt()
        q, k, v = (_chunks(x, order, W) for x in (q, k, v))
        y, total = self._within_chunks(q, k, v, order.unflatten(-1, (-1, W)), real)
        back = order.argsort(-1)[..., None]
        y = y.flatten(3, 4)
        y = y.gather(3, back.expand_as(y))
        shares = total.flatten(3, 4).gather(3, back).softmax(2).to(y.dtype)
        return (y * shares).sum(2)[:, :, :T].transpose(1, 2)

    def _within_chunks(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over a chunk and the one before: results like q [B, H, R, C, W, K], and log normalisers [..., 1]."""
        C, W = places.shape[-2:]
        key_places, hidden = places, torch.zeros(2 * W, dtype=torch.bool, device=q.device)
        if C > 1:
            before, another = _chunk_before(real, C, W)
            k, v, key_places = (_with_before(x, before) for x in (k, v, places))
            hidden = ~another[:, None, None, None, None, None] & (torch.arange(2 * W, device=q.device) < W)
        real = real[:, None, None, None, None]
        hidden = hidden[..., : key_places.shape[-1]] | (key_places >= real)[..., None, :]
        # A chunk of padding alone sees itself, so that its result, which nobody uses, is a number.
        hidden = hidden & (places < real)[..., None]
        scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        scores = scores.masked_fill(places[..., None] == key_places[..., None, :], ALONE).masked_fill(
            hidden, -torch.inf
        )
        total = scores.logsumexp(-1, keepdim=True)
        weights = F.dropout((scores - total).exp(), self.dropout, self.training)
        return weights.to(v.dtype) @ v, total

    @torch.no_grad()
    def _order(self, q: Tensor, real: Tensor) -> Tensor:
        """Places int64 [B, H, R, T]: by bucket, then by place; padding last. q [B, H, T, K]."""
        B, H, T, K = q.shape
        halves = (real // self.block_size).clamp(min=1)
        most, generator = int(halves.max()), self.generator()
        # Drawn bucket by bucket, so that more buckets for a longer sample leave the first ones as they are.
        rotations = torch.stack([torch.randn(self.num_hashes, H, K, generator=generator) for _ in range(most)], -1)
        turned = torch.einsum("bhtk,rhkn->bhrtn", q, rotations.to(q))
        used = torch.arange(most, device=q.device) < halves[:, None]
        turned = torch.cat([turned, -turned], -1)
        turned = turned.masked_fill(~torch.cat([used, used], -1)[:, None, None, None], -torch.inf)
        place = torch.arange(T, device=q.device)
        bucket = turned.argmax(-1).masked_fill(place >= real[:, None, None, None], 2 * most)
        return (bucket * T + place).argsort(-1)


MECHANISM = Mechanism(
    name=ReformerAttention.name,
    layer=ReformerAttention,
    label="Reformer",
    options={"num_hashes": "attention_hashes", "block_size": "attention_block", "seed": None},
)


def _chunks(x: Tensor, order: Tensor, W: int) -> Tensor:
    """x [B, H, T, K] in the order [B, H, R, T] -> [B, H, R, C, W, K]."""
    R, K = order.shape[2], x.shape[-1]
    taken = x[:, :, None].expand(-1, -1, R, -1, -1).gather(3, order[..., None].expand(-1, -1, -1, -1, K))
    return taken.unflatten(3, (-1, W))


def _chunk_before(real: Tensor, C: int, W: int) -> tuple[Tensor, Tensor]:
    """The number of the chunk before, [B or 1, C], from the first to the last with real tokens; and whether there is
    one.
    """
    used = ((real + W - 1) // W)[:, None]
    chunk = torch.arange(C, device=real.device)
    return torch.where(chunk == 0, used - 1, chunk - 1), (used[:, 0] > 1)


def _with_before(x: Tensor, before: Tensor) -> Tensor:
    """x [B, H, R, C, W, ...] -> [B, H, R, C, 2 W, ...], the chunk before first."""
    index = before.reshape(-1, 1, 1, before.shape[1], *[1] * (x.ndim - 4)).expand(x.shape)
    return torch.cat([x.gather(3, index), x], 4)
