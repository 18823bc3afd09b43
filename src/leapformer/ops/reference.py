"""The oracle: quadratic linear attention, straight from the formula, in any float dtype, with autograd.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K key width, V value width.
No fast path imports this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops.state import LinearState


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factors: Tensor,
    k_factors: Tensor,
    *,
    counts: Tensor | None,
    key_mask: Tensor | None,
    log_decay: Tensor | None,
    initial_state: LinearState | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, LinearState]:
    """weight(i, j) = q_i . k_j sigma(i, j) for visible, unmasked j; out_i = sum_j weight v_j / max(sum_j weight, eps).

    ``counts`` int64 [B or 1, T] is g, or None where every query sees every key; ``q_factors`` and ``k_factors`` have a
    head axis of H or 1 and G or 1. The rest is as in ``linear_attention``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, T, H, _ = q.shape
    S, G = k.shape[1], k.shape[2]
    q, k, v, q_factors, k_factors = (x.to(dtype) for x in (q, k, v, q_factors, k_factors))
    if key_mask is not None:
        k, v, k_factors = (x.masked_fill(~key_mask[:, :, None, None], 0) for x in (k, v, k_factors))
    phi_q = torch.einsum("bthr,bthk->bthrk", q_factors.expand(-1, -1, H, -1), q)
    phi_k = torch.einsum("bshr,bshk->bshrk", k_factors.expand(-1, -1, G, -1), k)
    phi_k_of_query_head = phi_k.repeat_interleave(H // G, dim=2)
    v_of_query_head = v.repeat_interleave(H // G, dim=2)

    weight = torch.einsum("bthrk,bshrk->bhts", phi_q, phi_k_of_query_head)
    if counts is not None:
        weight = weight * (torch.arange(S, device=q.device) < counts[:, :, None])[:, None]
    left = None
    if log_decay is not None:  # the state is multiplied by exp(log_decay[t]) before key t is added
        log_decay = log_decay.to(dtype)
        left = _left_between(log_decay)
        weight = weight * left
    numerator = torch.einsum("bhts,bshv->bthv", weight, v_of_query_head)
    normaliser = weight.sum(-1).transpose(1, 2)

    if initial_state is not None:
        old_kv, old_z = initial_state.kv.to(dtype), initial_state.z.to(dtype)
        from_kv = torch.einsum("bthrk,bhrkv->bthv", phi_q, old_kv.repeat_interleave(H // old_kv.shape[1], dim=1))
        from_z = torch.einsum("bthrk,bhrk->bth", phi_q, old_z.repeat_interleave(H // old_z.shape[1], dim=1))
        if log_decay is not None:
            seen = log_decay.cumsum(1).exp()
            from_kv, from_z = from_kv * seen[..., None], from_z * seen
        numerator, normaliser = numerator + from_kv, normaliser + from_z
    output = numerator / normaliser.clamp(min=eps)[..., None] if normalize else numerator
    if left is not None:  # of each key at the end: the last row, or nothing where T = 0
        phi_k, v = phi_k_of_query_head * left[:, :, -1:].sum(2).transpose(1, 2)[..., None, None], v_of_query_head
    return output, _final_state(phi_k, v, log_decay, initial_state, dtype)


def _left_between(log_decay: Tensor) -> Tensor:
    """[B, H, T, T]: what is left at t of key j, exp of the sum over j < s <= t, from ``log_decay`` [B, T, H]; 0 for t < j.

    Each sum by itself: a difference of running sums would be lost behind -1e6 and undefined behind -inf.
    """
    T = log_decay.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=log_decay.device).tril(-1)
    steps = log_decay.transpose(1, 2)[..., None].expand(*log_decay.shape[:1], log_decay.shape[2], T, T)
    sums = steps.masked_fill(~later, 0).cumsum(2)
    return sums.exp().tril()


def _final_state(
    phi_k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: LinearState | None, dtype: torch.dtype
) -> LinearState:
    """The initial state plus all unmasked keys, whatever g; with a decay, ``phi_k`` is what is left of each at the end."""
    total = None if log_decay is None else log_decay.sum(1)
    kv = torch.einsum("bshrk,bshv->bhrkv", phi_k, v)
    z = phi_k.sum(1)
    if initial_state is not None:
        keep = z.new_ones(z.shape[:2]) if total is None else total.exp()
        kv = kv + initial_state.kv.to(dtype) * keep[:, :, None, None, None]
        z = z + initial_state.z.to(dtype) * keep[:, :, None, None]
        if total is not None and initial_state.log_decay is not None:
            total = total + initial_state.log_decay.to(dtype)
    return LinearState(kv, z, total)
