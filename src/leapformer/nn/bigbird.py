"""BigBird. Letters: B batch, T tokens, H heads, K head width, C blocks, W tokens of a block, J key blocks of a query
block.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.nn.bidirectional import BidirectionalAttention, SharedBidirectional, lengths
from leapformer.nn.layer import Capabilities, Mechanism

WINDOW = (-1, 0, 1)


class BigBirdAttention(BidirectionalAttention):
    """softmax(q k^T / sqrt(K)) v where a sparse pattern of blocks allows it (arXiv 2007.14062, sec. 2 and appendix D).

    A block of queries sees its neighbours and itself, the first and the last block, and some more at random, which
    differ from head to head. The first and the last block see all. The random blocks are a part of the layer: they
    depend on ``seed`` and nothing else, so training and evaluation have the same. Padding changes nothing. Dropout is
    on the attention weights.

    Args:
        block_size: W. random_blocks: a query block. The others as in ``BidirectionalAttention``.
    """

    name = "bigbird"
    capabilities = Capabilities(causal=False, cross=False, streaming=False, arbitrary_length=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        block_size: int = 64,
        random_blocks: int = 3,
        **shared: Unpack[SharedBidirectional],
    ) -> None:
        super().__init__(hidden_size, num_heads, **shared)
        self.block_size, self.random_blocks = block_size, random_blocks
        self._scores = torch.empty(num_heads, 0, 0)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, W = q.shape[1], self.block_size
        real = lengths(mask, q)
        q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, -T % W)) for x in (q, k, v))
        C = q.shape[2] // W
        used = (real + W - 1) // W
        key_there = torch.arange(C * W, device=q.device) < real[:, None]  # [B or 1, C W]
        y = self._by_pattern(q, k, v, used, key_there)
        ends = self._of_ends(q, k, v, used, key_there)
        number = torch.arange(C, device=q.device)
        is_last = (number == (used - 1)[:, None])[:, None, :, None, None]
        y = torch.where(is_last, ends[:, :, None, W:], y)
        y = torch.where((number == 0)[:, None, None], ends[:, :, None, :W], y)
        return y.flatten(2, 3)[:, :, :T].transpose(1, 2)

    def _by_pattern(self, q: Tensor, k: Tensor, v: Tensor, used: Tensor, key_there: Tensor) -> Tensor:
        """Every block under the pattern, [B, H, C, W, K]; q, k, v [B, H, C W, K]."""
        B, H, W = q.shape[0], q.shape[1], self.block_size
        C = q.shape[2] // W
        blocks, there = self.pattern(C, used)
        of_blocks = blocks.flatten(2)[..., None].expand(-1, -1, -1, W)
        keys_there = key_there.unflatten(1, (C, W))[:, None].expand(-1, H, -1, -1).gather(2, of_blocks)
        mask = (there[..., None] & keys_there.unflatten(2, (C, -1))).flatten(-2)  # [B or 1, H, C, J W]
        mask = mask.expand(B, -1, -1, -1).flatten(0, 1)[:, :, None]
        q, k, v = q.unflatten(2, (C, W)).flatten(0, 1), _blocks_of(k, blocks, W), _blocks_of(v, blocks, W)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return y.unflatten(0, (B, H))

    def _of_ends(self, q: Tensor, k: Tensor, v: Tensor, used: Tensor, key_there: Tensor) -> Tensor:
        """The first and the last block with tokens over all keys, [B, H, 2 W, K]."""
        B, H, W, K = q.shape[0], q.shape[1], self.block_size, q.shape[-1]
        last = ((used - 1) * W)[:, None, None, None] + torch.arange(W, device=q.device)[:, None]
        ends = torch.cat([q[:, :, :W], q.gather(2, last.expand(B, H, W, K))], 2)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(ends, k, v, attn_mask=key_there[:, None, None], dropout_p=dropout)

    def pattern(self, C: int, used: Tensor) -> tuple[Tensor, Tensor]:
        """Key blocks int64 [B or 1, H, C, J] of every query block, and which of them count; used [B or 1]: blocks with
        tokens.
        """
        row, column = torch.arange(C, device=used.device)[:, None], torch.arange(C, device=used.device)
        last = (used - 1)[:, None, None, None]
        inner = (column > 0) & (column < last)  # neither the first nor the last
        free = (inner & ((row - column).abs() > 1)).expand(-1, self.num_heads, -1, -1)
        scores = self._random_scores(C).to(used.device).masked_fill(~free, -1)
        drawn = scores.topk(min(self.random_blocks, C), dim=-1)
        near = row + torch.tensor(WINDOW, device=used.device)
        first = torch.zeros_like(near[:, :1])
        shape = (len(used), self.num_heads, C, -1)
        parts = [first.expand(shape), last.expand(*shape[:3], 1), near.clamp(0, C - 1).expand(shape), drawn.indices]
        ends_there = torch.cat([torch.ones_like(last, dtype=torch.bool), last > 0], -1).expand(shape)
        near_there = ((near > 0) & (near < last)).expand(shape)
        return torch.cat(parts, -1), torch.cat([ends_there, near_there, drawn.values >= 0], -1)

    def _random_scores(self, C: int) -> Tensor:
        """[H, C, C] in [0, 1): who scores most is seen. The scores of the first blocks don't depend on how many
        follow.
        """
        known = self._scores.shape[1]
        if known < C:
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.empty(self.num_heads, C, C)
            for n in range(C):  # block n's row and column as far as the blocks before it
                ring = torch.rand(self.num_heads, 2 * n + 1, generator=generator)
                scores[:, n, : n + 1], scores[:, :n, n] = ring[:, : n + 1], ring[:, n + 1 :]
            self._scores = scores
        return self._scores[:, :C, :C]


MECHANISM = Mechanism(
    name=BigBirdAttention.name,
    layer=BigBirdAttention,
    label="BigBird",
    options={"block_size": "attention_block", "random_blocks": "attention_random_blocks", "seed": None},
)


def _blocks_of(x: Tensor, blocks: Tensor, W: int) -> Tensor:
    """x [B, H, C W, K] -> [B H, C, J W, K], the key blocks [B or 1, H, C, J] of every query block."""
    B, H, _, K = x.shape
    C = blocks.shape[2]
    rows = torch.arange(B * H, device=x.device).view(B, H, 1, 1) * C + blocks
    taken = x.reshape(B * H * C, W * K).index_select(0, rows.flatten())
    return taken.view(B * H, C, -1, K)
