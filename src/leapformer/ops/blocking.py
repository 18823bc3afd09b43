"""How the dense core cuts its work into blocks, and the views of tensors that belong to a block.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, r = H/G, K key width, V value width, C tokens of
a chunk, n chunks of a block, D any width; of a block B and G count its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from leapformer.ops.arguments import Arguments

CHUNK = 64
MOST_CHUNKS = 16  # of a block
# Elements of a block's features: on the CPU about what keeps its temporaries in cache, elsewhere enough to be busy.
BLOCK_ELEMENTS = {"cpu": 2**17}
BLOCK_ELEMENTS_ELSEWHERE = 2**23


class Block(NamedTuple):
    """B samples from ``sample`` on, G key/value heads from ``group`` on, n chunks of C tokens from ``start`` on."""

    sample: int
    B: int
    group: int
    G: int
    start: int
    n: int
    C: int

    @property
    def states(self) -> tuple[slice, slice]:
        """Where its samples and heads are in [B, G, ...]."""
        return slice(self.sample, self.sample + self.B), slice(self.group, self.group + self.G)


def rows_of(x: Arguments) -> Iterator[Block]:
    """For each set of samples and heads that go through the sequence together, the largest block that they may form.

    Many tokens of few heads: few states at block starts have then to be kept, and slices of [B, T, H, D] run far. At
    most about an eighth of all, so that the temporaries of a short sequence are not larger than the gradients of its
    inputs.
    """
    (B, T, H, K), (S, G) = x.q.shape, x.k.shape[1:3]
    r, T, width = max(1, H // max(1, G)), max(1, T, S), max(1, x.rank * K, x.v.shape[3])
    most = BLOCK_ELEMENTS.get(x.q.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    token_heads = min(most, max(most // 2, B * T * H * width // 8)) // width // r
    chunks = max(1, min(MOST_CHUNKS, token_heads // CHUNK))
    samples = max(1, min(B, token_heads // min(T, chunks * CHUNK)))
    groups = max(1, min(G, token_heads // (min(T, chunks * CHUNK) * samples)))
    for b in range(0, B, samples):
        for g in range(0, G, groups):
            yield Block(b, min(samples, B - b), g, min(groups, G - g), 0, chunks, CHUNK)


def causal_blocks(rows: Block, T: int) -> Iterator[Block]:
    """Blocks of whole chunks, then the tail of fewer than CHUNK tokens as a chunk of its own size."""
    whole = T // CHUNK * CHUNK
    for start in range(0, whole, rows.n * CHUNK):
        yield rows._replace(start=start, n=min(rows.n, (whole - start) // CHUNK))
    if whole < T:
        yield rows._replace(start=whole, n=1, C=T - whole)


def wide_blocks(rows: Block, T: int) -> Iterator[Block]:
    """Blocks of one chunk each: for attention that sees everything."""
    size = rows.n * rows.C
    for start in range(0, T, size):
        yield rows._replace(start=start, n=1, C=min(size, T - start))


def view(x: Tensor, block: Block, groups: int) -> Tensor:
    """Of x [B, T, heads(, D)] that has a head or more for each of ``groups``, or one for all, a view
    [n, B, G, heads / groups, C, D or 1] of the block (one head for all: both head axes are 1)."""
    _, B, _, G, start, n, C = block
    sample, token, head, *width = x.stride()
    offset = x.storage_offset() + block.sample * sample + start * token
    if x.shape[2] == 1:
        G = r = 1
    else:
        r = x.shape[2] // groups
        offset += block.group * r * head
    D = x.shape[3] if width else 1
    # One call in place of a slice, a view and a permutation: blocks are small, and views are a good part of their cost.
    return x.as_strided((n, B, G, r, C, D), (C * token, sample, r * head, head, token, *(width or (1,))), offset)
