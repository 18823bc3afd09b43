"""The oracle: quadratic linear attention, straight from the formula, in any float dtype, with autograd.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K key width, V value width.
No fast path imports this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops.arguments import Arguments
from leapformer.ops.checks import boundaries
from leapformer.ops.implementation import BASIS, Implementation
from leapformer.ops.visibility import Staircase


def attend(x: Arguments, update_state: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V] and the final kv and z: one sequence of a packing after the other. It writes to no state."""
    if x.relu:
        x = x.but(q=torch.relu(x.q), k=torch.relu(x.k))
    if x.q_factors is None or x.k_factors is None:
        x = x.but(q_factors=x.q.new_ones(*x.q.shape[:2], 1, 1), k_factors=x.k.new_ones(*x.k.shape[:2], 1, 1))
    results = [_attend(sequence) for sequence in _sequences(x)]
    output, kv, z = (list(field) for field in zip(*results, strict=True))
    return torch.cat(output, dim=1).to(x.q.dtype), torch.cat(kv), torch.cat(z)


IMPLEMENTATION = Implementation(attend, takes=BASIS | {"later_decay"})


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _sequences(x: Arguments) -> list[Arguments]:
    """Each packed sequence by itself, or all samples as they are; visibility as ``counts`` or none."""
    T, S = x.q.shape[1], x.k.shape[1]
    if x.cu_seqlens is None or x.cu_seqlens_k is None:
        return [_sequence(x, slice(None), slice(0, T), slice(0, S))]
    queries, keys = boundaries(x.cu_seqlens, x.cu_seqlens_k, T, S, same=x.causal)
    return [
        _sequence(x, slice(n, n + 1), slice(*queries[n : n + 2]), slice(*keys[n : n + 2]))
        for n in range(len(queries) - 1)
    ]


def _sequence(x: Arguments, row: slice, t: slice, s: slice) -> Arguments:
    """The queries ``t`` and the keys ``s``, which go on from the states ``row``."""

    def part(field: Tensor | None, slots: slice) -> Tensor | None:
        return None if field is None else field[:, slots]

    counts = part(x.counts, t)
    if x.causal and x.later_decay is None:
        counts = Staircase.causal().counts(t.stop - t.start, s.stop - s.start, device=x.q.device)
    return x.but(
        q=x.q[:, t],
        k=x.k[:, s],
        v=x.v[:, s],
        q_factors=part(x.q_factors, t),
        k_factors=part(x.k_factors, s),
        log_decay=part(x.log_decay, t),
        later_decay=part(x.later_decay, t),
        kv=None if x.kv is None else x.kv[row],
        z=None if x.z is None else x.z[row],
        key_mask=part(x.key_mask, s),
        counts=counts,
    )


def _attend(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """weight(i, j) = q_i . k_j sigma(i, j) for visible, unmasked j; out_i = sum_j weight v_j / max(sum_j weight, eps).

    Factors are given, and causal attention by its ``counts``. All results are float32 or better.
    """
    dtype = x.compute_dtype
    B, T, H, _ = x.q.shape
    S, G = x.k.shape[1], x.k.shape[2]
    assert x.q_factors is not None and x.k_factors is not None
    q, k, v, q_factors, k_factors = (t.to(dtype) for t in (x.q, x.k, x.v, x.q_factors, x.k_factors))
    if x.key_mask is not None:
        hidden = ~x.key_mask[:, :, None, None]
        k, v, k_factors = (t.masked_fill(hidden, 0) for t in (k, v, k_factors))
    phi_q = torch.einsum("bthr,bthk->bthrk", q_factors.expand(-1, -1, H, -1), q)
    phi_k = torch.einsum("bshr,bshk->bshrk", k_factors.expand(-1, -1, G, -1), k)
    phi_k_of_query_head = phi_k.repeat_interleave(H // G, dim=2)
    v_of_query_head = v.repeat_interleave(H // G, dim=2)

    weight = torch.einsum("bthrk,bshrk->bhts", phi_q, phi_k_of_query_head)
    if x.counts is not None:
        weight = weight * (torch.arange(S, device=q.device) < x.counts[:, :, None])[:, None]
    left = log_decay = None
    if x.log_decay is not None:  # the state is multiplied by exp(log_decay[t]) before key t is added
        log_decay = x.log_decay.to(dtype)
        left = _left_between(log_decay)
        weight = weight * (left if x.later_decay is None else left + _left_before(x.later_decay.to(dtype)))
    numerator = torch.einsum("bhts,bshv->bthv", weight, v_of_query_head)
    normaliser = weight.sum(-1).transpose(1, 2)

    if x.kv is not None and x.z is not None:
        old_kv, old_z = x.kv.to(dtype), x.z.to(dtype)
        from_kv = torch.einsum("bthrk,bhrkv->bthv", phi_q, old_kv.repeat_interleave(H // old_kv.shape[1], dim=1))
        from_z = torch.einsum("bthrk,bhrk->bth", phi_q, old_z.repeat_interleave(H // old_z.shape[1], dim=1))
        if log_decay is not None:
            seen = log_decay.cumsum(1).exp()
            from_kv, from_z = from_kv * seen[..., None], from_z * seen
        numerator, normaliser = numerator + from_kv, normaliser + from_z
    output = numerator / normaliser.clamp(min=x.eps)[..., None] if x.normalize else numerator
    if left is not None:  # of each key at the end: the last row, or nothing where T = 0
        phi_k, v = phi_k_of_query_head * left[:, :, -1:].sum(2).transpose(1, 2)[..., None, None], v_of_query_head
    return output, *_final_state(phi_k, v, log_decay, x)


def _left_between(log_decay: Tensor) -> Tensor:
    """[B, H, T, T]: what is left at t of key j, exp of the sum over j < s <= t, from ``log_decay`` [B, T, H]; 0 for t <
    j.

    Each sum by itself: a difference of running sums would be lost behind -1e6 and undefined behind -inf.
    """
    T = log_decay.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=log_decay.device).tril(-1)
    steps = log_decay.transpose(1, 2)[..., None].expand(*log_decay.shape[:1], log_decay.shape[2], T, T)
    sums = steps.masked_fill(~later, 0).cumsum(2)
    return sums.exp().tril()


def _left_before(later_decay: Tensor) -> Tensor:
    """[B, H, T, T]: what is left at t of the later key j, exp of the sum over t <= s < j; 0 for t >= j."""
    T = later_decay.shape[1]
    before = torch.ones(T, T, dtype=torch.bool, device=later_decay.device).tril(-1)
    steps = later_decay.transpose(1, 2)[..., None, :].expand(*later_decay.shape[:1], later_decay.shape[2], T, T)
    sums = steps.masked_fill(before, 0).cumsum(3)  # over s from t to j; one less is wanted
    return F.pad(sums, (1, 0))[..., :T].exp().triu(1)


def _final_state(phi_k: Tensor, v: Tensor, log_decay: Tensor | None, x: Arguments) -> tuple[Tensor, Tensor]:
    """The initial state plus all unmasked keys, whatever g; with a decay, ``phi_k`` is what is left of each at the
    end."""
    total = None if log_decay is None else log_decay.sum(1)
    kv = torch.einsum("bshrk,bshv->bhrkv", phi_k, v)
    z = phi_k.sum(1)
    if x.kv is not None and x.z is not None:
        keep = z.new_ones(z.shape[:2]) if total is None else total.exp()
        kv = kv + x.kv.to(kv.dtype) * keep[:, :, None, None, None]
        z = z + x.z.to(kv.dtype) * keep[:, :, None, None]
    return kv, z
