"""Every other visibility and packing, brought to the dense causal core by moving tokens.

A staircase is causal attention over one merged sequence in which query i stands after the keys it sees: query i goes to
slot g(i) + i, key j to slot j + #{i: g(i) <= j}. Slots of the other kind hold zeros, which add nothing. Packed
sequences become a few padded batches of sequences of similar length, less than half of each padding.

Letters: B batch, T queries, S keys, L = T + S, N packed sequences; other letters as in chunks.py.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from leapformer.ops import chunks
from leapformer.ops.arguments import Arguments, Gradients, Incoming
from leapformer.ops.checks import boundaries
from leapformer.ops.chunks import Result


def forward(x: Arguments) -> Result:
    """Attention under any visibility, packed or not."""
    if x.cu_seqlens is not None and x.cu_seqlens_k is not None:
        return _packed_forward(x, x.cu_seqlens, x.cu_seqlens_k)
    if x.counts is None:
        return chunks.forward(x)
    places = _Merged(x.counts, x)
    result = chunks.forward(places.merge(x))
    normaliser = places.queries_out(result.normaliser) if x.normalize else result.normaliser
    return result._replace(output=places.queries_out(result.output), normaliser=normaliser)


def backward(x: Arguments, saved: Result, incoming: Incoming) -> Gradients:
    """Gradients of ``forward``, whose result is ``saved``."""
    if x.cu_seqlens is not None and x.cu_seqlens_k is not None:
        return _packed_backward(x, x.cu_seqlens, x.cu_seqlens_k, saved, incoming)
    if x.counts is None:
        return chunks.backward(x, saved, incoming)
    places = _Merged(x.counts, x)
    if x.normalize:  # else neither is looked at
        saved = saved._replace(output=places.queries_in(saved.output), normaliser=places.queries_in(saved.normaliser))
    incoming = incoming._replace(output=places.queries_in(incoming.output))
    grads = chunks.backward(places.merge(x), saved, incoming)
    return grads._replace(
        q=places.queries_out(grads.q),
        k=places.keys_out(grads.k),
        v=places.keys_out(grads.v),
        q_factors=None if grads.q_factors is None else places.queries_out(grads.q_factors),
        k_factors=None if grads.k_factors is None else places.keys_out(grads.k_factors),
    )


class _Merged:
    """Where queries and keys stand in the merged sequence."""

    def __init__(self, counts: Tensor, x: Arguments) -> None:
        B, T, S = x.q.shape[0], x.q.shape[1], x.k.shape[1]
        counts = counts.clamp(0, S).expand(B, T).contiguous()
        keys = torch.arange(S, device=counts.device).expand(B, S).contiguous()
        self.length = T + S
        self.query_slots = counts + torch.arange(T, device=counts.device)
        self.key_slots = keys + torch.searchsorted(counts, keys, right=True)
        self.key_mask = x.key_mask

    def queries_in(self, x: Tensor) -> Tensor:
        return self._spread(x, self.query_slots)

    def queries_out(self, x: Tensor) -> Tensor:
        return torch.gather(x, 1, _over(self.query_slots, x))

    def keys_in(self, x: Tensor) -> Tensor:
        return self._spread(_without_hidden(x, self.key_mask), self.key_slots)

    def keys_out(self, x: Tensor) -> Tensor:
        return _without_hidden(torch.gather(x, 1, _over(self.key_slots, x)), self.key_mask)

    def _spread(self, x: Tensor, slots: Tensor) -> Tensor:
        merged = x.new_zeros(x.shape[0], self.length, *x.shape[2:])
        return merged.scatter_(1, _over(slots, x), x)

    def merge(self, x: Arguments) -> Arguments:
        """Causal attention over the merged sequence."""
        return x._replace(
            q=self.queries_in(x.q),
            k=self.keys_in(x.k),
            v=self.keys_in(x.v),
            q_factors=None if x.q_factors is None else self.queries_in(x.q_factors),
            k_factors=None if x.k_factors is None else self.keys_in(x.k_factors),
            key_mask=None,
            counts=None,
            causal=True,
        )


def _over(slots: Tensor, x: Tensor) -> Tensor:
    """slots [B, n] -> an index that moves whole rows of x [B, *, ...]."""
    return slots.reshape(*slots.shape, *[1] * (x.dim() - 2)).expand(*slots.shape, *x.shape[2:])


def _without_hidden(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return x if key_mask is None else x.masked_fill(~key_mask.reshape(*key_mask.shape, *[1] * (x.dim() - 2)), 0)


# ---- packed sequences ------------------------------------------------------------------------------------------------


class _Bucket(NamedTuple):
    """Sequences of similar length: ``rows`` int64 [n] which, and for each padded slot the packed token and if it is
    one."""

    rows: Tensor
    queries: Tensor
    query_real: Tensor
    keys: Tensor
    key_real: Tensor

    def queries_in(self, x: Tensor) -> Tensor:
        return _without_hidden(x[0][self.queries], self.query_real)

    def keys_in(self, x: Tensor) -> Tensor:
        return _without_hidden(x[0][self.keys], self.key_real)

    def queries_to(self, packed: Tensor, x: Tensor) -> None:
        packed[0][self.queries[self.query_real]] = x[self.query_real].to(packed.dtype)

    def keys_to(self, packed: Tensor, x: Tensor) -> None:
        packed[0][self.keys[self.key_real]] = x[self.key_real].to(packed.dtype)

    def unpack(self, x: Arguments) -> Arguments:
        """The sequences as samples of a batch; padding queries see all, which is nothing."""
        counts = x.counts
        if counts is not None:
            counts = counts[0][self.queries].masked_fill(~self.query_real, self.keys.shape[1])
        return x._replace(
            q=self.queries_in(x.q),
            k=self.keys_in(x.k),
            v=self.keys_in(x.v),
            q_factors=None if x.q_factors is None else self.queries_in(x.q_factors),
            k_factors=None if x.k_factors is None else self.keys_in(x.k_factors),
            log_decay=None if x.log_decay is None else self.queries_in(x.log_decay),
            later_decay=None if x.later_decay is None else self.queries_in(x.later_decay),
            kv=None if x.kv is None else x.kv[self.rows],
            z=None if x.z is None else x.z[self.rows],
            key_mask=None if x.key_mask is None else x.key_mask[0][self.keys],
            counts=counts,
            cu_seqlens=None,
            cu_seqlens_k=None,
        )


def _packed_forward(x: Arguments, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Result:
    """B = 1, N sequences behind one another; states are [N, ...] and counts relative to their own sequence."""
    buckets = _buckets(cu_seqlens, cu_seqlens_k, x.q.shape[1], x.k.shape[1], same=x.causal)
    N = x.sequences
    G, K, V = x.k.shape[2], x.k.shape[3], x.v.shape[3]
    dtype, T, H = x.compute_dtype, x.q.shape[1], x.q.shape[2]
    result = Result(
        x.q.new_zeros(1, T, H, V),
        x.q.new_zeros(N, G, x.rank, K, V, dtype=dtype),
        x.q.new_zeros(N, G, x.rank, K, dtype=dtype),
        x.q.new_zeros(1, T if x.normalize else 0, H, dtype=dtype),
    )
    for bucket in buckets:
        part = forward(bucket.unpack(x))
        bucket.queries_to(result.output, part.output)
        if x.normalize:
            bucket.queries_to(result.normaliser, part.normaliser)
        result.kv[bucket.rows], result.z[bucket.rows] = part.kv, part.z
    return result


def _packed_backward(
    x: Arguments, cu_seqlens: Tensor, cu_seqlens_k: Tensor, saved: Result, incoming: Incoming
) -> Gradients:
    """Gradients of ``_packed_forward``."""
    q, k, v, *others = (None if field is None else torch.zeros_like(field) for field in x.differentiable)
    assert q is not None and k is not None and v is not None
    total = Gradients(q, k, v, *others)
    for bucket in _buckets(cu_seqlens, cu_seqlens_k, x.q.shape[1], x.k.shape[1], same=x.causal):
        saved_part = Result(
            bucket.queries_in(saved.output),
            saved.kv[bucket.rows],
            saved.z[bucket.rows],
            bucket.queries_in(saved.normaliser) if x.normalize else saved.normaliser,
        )
        incoming_part = Incoming(
            bucket.queries_in(incoming.output),
            None if incoming.kv is None else incoming.kv[bucket.rows],
            None if incoming.z is None else incoming.z[bucket.rows],
        )
        part = backward(bucket.unpack(x), saved_part, incoming_part)
        for name in ("q", "q_factors", "log_decay", "later_decay"):
            if getattr(total, name) is not None:
                bucket.queries_to(getattr(total, name), getattr(part, name))
        for name in ("k", "v", "k_factors"):
            if getattr(total, name) is not None:
                bucket.keys_to(getattr(total, name), getattr(part, name))
        if total.kv is not None and total.z is not None and part.kv is not None and part.z is not None:
            total.kv[bucket.rows], total.z[bucket.rows] = part.kv.to(total.kv.dtype), part.z.to(total.z.dtype)
    return total


def _buckets(cu_seqlens: Tensor, cu_seqlens_k: Tensor, tokens: int, slots: int, *, same: bool) -> list[_Bucket]:
    """Sequences grouped by the powers of two that hold their lengths; ``same``: each has as many keys as queries."""
    queries, keys = boundaries(cu_seqlens, cu_seqlens_k, tokens, slots, same=same)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in range(len(queries) - 1):
        T, S = queries[row + 1] - queries[row], keys[row + 1] - keys[row]
        if T or S:
            groups[T.bit_length(), S.bit_length()].append(row)
    # A sequence without queries and keys still hands its initial state on.
    empty = [row for row in range(len(queries) - 1) if queries[row + 1] == queries[row] and keys[row + 1] == keys[row]]
    members = [*groups.values(), *([empty] if empty else [])]
    device = cu_seqlens.device
    return [
        _Bucket(torch.tensor(rows, device=device), *_padded(rows, queries, device), *_padded(rows, keys, device))
        for rows in members
    ]


def _padded(rows: list[int], bounds: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For every sequence and slot the packed index, and whether the slot is real."""
    starts = torch.tensor([bounds[row] for row in rows], device=device)[:, None]
    lengths = torch.tensor([bounds[row + 1] - bounds[row] for row in rows], device=device)[:, None]
    slots = torch.arange(int(lengths.max()), device=device)[None]
    real = slots < lengths
    return torch.where(real, starts + slots, 0), real
