"""From what a door was given to what implementations take: visibility, packing, head groups, angles and LeaP modules.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, r hidden units of a LeaP module, K key
width, N packed sequences.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops.arguments import ANGLES, MODULES, Arguments, LeapWeights
from leapformer.ops.autocast import without_autocast
from leapformer.ops.visibility import Staircase, Visible


def is_causal(visible: Visible) -> bool:
    """Whether it is the word; what else it may be is for ``lower``."""
    return isinstance(visible, str) and visible == "causal"


def lower(x: Arguments, visible: Visible) -> Arguments:
    """Visibility as ``causal`` or ``counts``, boundaries on both sides or none, and an eps that does its work.

    The same object where nothing is to do: that is the step of one token.
    """
    changes: dict[str, Any] = {}
    if x.log_decay is not None and not x.causal:
        x, visible = x.but(later_decay=_later_decay(x, visible), causal=True), "causal"
    if x.cu_seqlens is not None or not isinstance(visible, str):
        causal, counts = _causal_and_counts(x, visible)
        bounds = x.cu_seqlens if x.cu_seqlens_k is None else x.cu_seqlens_k
        changes = {"causal": causal, "counts": counts, "cu_seqlens_k": bounds}
    least = 2.3e-308 if x.q.dtype is torch.float64 else 1.2e-38
    if type(x.eps) is not float or x.eps < least:  # a clamp must not become 0: sums need a dtype that has its inverse
        changes["eps"] = max(float(x.eps), least)
    return x.but(**changes) if changes else x


def fit(x: Arguments, takes_modules: bool, takes_angles: bool) -> Arguments:
    """Lowered arguments for an implementation: LeaP modules and angles only where it takes them, and with a decay a key
    head for each query head, for which modules, which are of the key heads, become factors."""
    grouped = x.log_decay is not None and x.q.shape[2] != x.k.shape[2]
    if x.q_angles is not None and not takes_angles:
        x = without_angles(x)
    if x.q_w2 is not None and (grouped or not takes_modules):
        x = without_modules(x)
    if not grouped:
        return x
    H = x.q.shape[2]
    own = {
        name: _for_query_heads(field, H)
        for name, field in (("k_factors", x.k_factors), ("k_angles", x.k_angles))
        if field is not None and field.shape[2] > 1
    }
    return x.but(k=_for_query_heads(x.k, H), v=_for_query_heads(x.v, H), **own)


def without_angles(x: Arguments) -> Arguments:
    """The same attention with factors in place of angles; padding may hold anything, so its angles are hidden."""
    if x.q_angles is None or x.k_angles is None:
        return x
    k_angles = x.k_angles
    if x.key_mask is not None:
        k_angles = k_angles.masked_fill(~x.key_mask[:, :, None, None], 0)
    q_factors, k_factors = angle_factors(x.q_angles), angle_factors(k_angles)
    return x.but(q_factors=q_factors, k_factors=k_factors, **dict.fromkeys(ANGLES))


def without_modules(x: Arguments) -> Arguments:
    """The same attention with factors in place of LeaP modules."""
    q_leap, k_leap = x.q_leap, x.k_leap
    if q_leap is None or k_leap is None:
        return x
    k = x.k
    if x.key_mask is not None:
        k = k.masked_fill(~x.key_mask[:, :, None, None], 0)  # padding may hold anything; the module must not see it
    q, k = torch.relu(x.q), torch.relu(k)
    return x.but(
        q=q,
        k=k,
        q_factors=leap_factors(q, q_leap),
        k_factors=leap_factors(k, k_leap),
        relu=False,
        **dict.fromkeys(MODULES),
    )


def angle_factors(angles: Tensor) -> Tensor:
    """[cos a, sin a] of angles [B, T, H, m] -> [B, T, H, 2 m], in float32 or better."""
    angles = angles.to(torch.promote_types(angles.dtype, torch.float32))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def leap_score(x: Tensor, weights: LeapWeights) -> Tensor:
    """What goes into the sigmoid of a LeaP module: x [B, T, H, K] -> [B, T, H], float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        w1, b1, w2, b2 = (None if w is None else w.to(dtype) for w in weights)
        assert w2 is not None and b2 is not None
        x = x.to(dtype)
        if w1 is not None:
            x = torch.relu(_by_head(x, w1) + (0 if b1 is None else b1))
        return _by_head(x, w2[:, None])[..., 0] + b2


def leap_factors(x: Tensor, weights: LeapWeights) -> Tensor:
    """``cosine_factors(proportion(x, weights))``, and as exact where 1 - P is too small to be seen in P."""
    score = leap_score(x, weights)
    return torch.stack([-score, score], dim=-1).sigmoid().mul(math.pi / 2).sin()


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, H, K] times weight [1 or H, r, K] -> [B, T, H, r]."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.einsum("bthk,hrk->bthr", x, weight)


def _for_query_heads(x: Tensor, H: int) -> Tensor:
    return x.repeat_interleave(H // x.shape[2], dim=2)


def _causal_and_counts(x: Arguments, visible: Visible) -> tuple[bool, Tensor | None]:
    """(causal, counts): counts int64 [B or 1, T] relative to the own sequence, None for "all" and causal.

    Causal attention means to every implementation that each sequence has as many keys as queries; where packed keys
    have boundaries of their own it is a staircase like others. With a decay it can't be, and implementations refuse.
    """
    if isinstance(visible, str):
        if visible == "all" or x.log_decay is not None or _same_boundaries(x.cu_seqlens, x.cu_seqlens_k):
            return visible == "causal", None
        visible = Staircase.causal()
    T, S, device = x.q.shape[1], x.k.shape[1], x.q.device
    if x.cu_seqlens is None:
        if isinstance(visible, Staircase):
            return False, visible.counts(T, S, device=device)
        return False, visible.to(torch.int64).clamp(0, S).expand(x.q.shape[0], T)
    starts = x.cu_seqlens.to(torch.int64)
    bounds = x.cu_seqlens if x.cu_seqlens_k is None else x.cu_seqlens_k
    slots = torch.arange(T, device=device)
    row = torch.searchsorted(starts[1:].contiguous(), slots, right=True)
    row = row.clamp(max=max(starts.shape[0] - 2, 0))
    lengths = bounds.diff().to(torch.int64)[row]
    if not isinstance(visible, Staircase):
        return False, torch.minimum(visible.to(torch.int64).clamp(min=0), lengths[None])
    own = Staircase(*(f.to(device)[row] if isinstance(f, Tensor) and f.numel() > 1 else f for f in visible))
    return False, own.at((slots - starts[row])[:, None], lengths[:, None]).reshape(1, T)


def _later_decay(x: Arguments, visible: Visible) -> Tensor | None:
    """The decay [B, T, H] towards earlier queries, of a key in a later one's place: none leads out of a block."""
    assert x.log_decay is not None
    T, device = x.q.shape[1], x.q.device
    if T <= 1:
        return None
    if not isinstance(visible, Staircase):
        return x.log_decay
    # With packed sequences blocks count from the start of each.
    i = torch.arange(T, device=device)
    if x.cu_seqlens is not None:
        starts = x.cu_seqlens.to(torch.int64)
        row = torch.searchsorted(starts[1:].contiguous(), i, right=True).clamp(max=max(starts.shape[0] - 2, 0))
        i = i - starts[row]
    is_last = (i + visible.phase + 1) % visible.every == 0
    return x.log_decay.masked_fill(is_last[None, :, None], -math.inf)


def _same_boundaries(cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> bool:
    """Whether keys are known to be packed as queries are; elsewhere than on the CPU a look would make the device
    wait."""
    if cu_seqlens_k is None or cu_seqlens is None or cu_seqlens_k is cu_seqlens:
        return True
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return cu_seqlens.tolist() == cu_seqlens_k.tolist()
