"""The public doors of linear attention: arguments are checked once, here, and handed to one implementation.

Letters: B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), R rank of the re-weighting,
K key width, V value width, N packed sequences.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops import native, reference, torch_impl, triton_impl
from leapformer.ops.arguments import LeapWeights
from leapformer.ops.autocast import without_autocast
from leapformer.ops.checks import Call, boundaries, check_arguments, check_tensors, expect
from leapformer.ops.state import LinearState
from leapformer.ops.visibility import Staircase, Visible

Impl = Literal["auto", "reference", "torch", "native", "triton"]

_log = logging.getLogger(__name__)
_announced: set[str] = set()


class AttentionOutput(NamedTuple):
    """``output`` [B, T, H, V] in the input dtype; ``state`` after all S keys, or None where it was not asked for."""

    output: Tensor
    state: LinearState | None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factors: Tensor | None = None,
    k_factors: Tensor | None = None,
    *,
    visible: Visible = "all",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    update_state: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    relu: bool = False,
    impl: Impl = "auto",
) -> AttentionOutput:
    """out_i = sum_j w_ij v_j / max(sum_j w_ij, eps) with w_ij = q_i . k_j sum_r q_factors[i, r] k_factors[j, r].

    Args:
        q: query features [B, T, H, K], non-negative where ``normalize`` is used (``relu`` makes them so).
        k: key features [B, S, G, K]; v: values [B, S, G, V]; q, k and v share one floating dtype.
        q_factors: [B, T, H or 1, R] and k_factors [B, S, G or 1, R], both or neither; any floating dtype.
        visible: "all", "causal" (needs T = S), a ``Staircase``, or integers [B or 1, T] of how many key slots each
            query sees, padding included, clamped to [0, S]; that they never decrease is the caller's promise.
        key_mask: bool [B, S], True = real; masked keys enter neither numerator, normaliser nor state.
        cu_seqlens: int32 [N + 1], B = 1: N sequences packed behind one another; states are then [N, ...] and visibility
            counts from the start of each sequence. cu_seqlens_k where keys are packed otherwise.
        log_decay: [B, T, H] <= 0, causal only; the state is multiplied by exp(log_decay[t]) before key t is added.
        initial_state: keys before slot 0, seen by every query; with a decay it has H heads.
        return_state: also return the state after all unmasked keys (float32 or better).
        update_state: write that state into the tensors of ``initial_state``, at their addresses, and return it; without
            gradients only. One token then copies no state.
        normalize: False returns the numerator.
        eps: clamp of the normaliser; below it the normaliser gets no gradient.
        relu: use relu(q) and relu(k) in place of q and k, without making copies of that size.
        impl: "reference" (quadratic oracle), "torch" (linear), "native" (kernels for the CPU), "triton" (kernels for a
            GPU), or "auto", which takes the kernels of the tensors' device, or torch where they can't run.

    Returns:
        ``AttentionOutput(output [B, T, H, V], state)``. A query without features or visible keys gets exactly 0.

    Raises:
        ValueError: an argument does not fit, or a named implementation can't run; the message says what was expected and
            got.

    Source: arXiv 2405.13046, eq. 5-8; arXiv 2202.08791, eq. 10; arXiv 2006.16236, eq. 4-9.
    """
    check_arguments(
        q, k, v, q_factors, k_factors, visible, key_mask, cu_seqlens, cu_seqlens_k, log_decay, initial_state, eps,
        normalize=normalize, relu=relu, update_state=update_state,
    )  # fmt: skip
    causal, counts = _lower_visibility(visible, q, k, cu_seqlens, cu_seqlens_k, log_decay)
    if log_decay is not None and q.shape[2] != k.shape[2]:
        k, v = (_for_query_heads(x, q.shape[2]) for x in (k, v))
        if k_factors is not None and k_factors.shape[2] > 1:
            k_factors = _for_query_heads(k_factors, q.shape[2])
    rank = 1 if q_factors is None else q_factors.shape[-1]
    run = _implementation(impl, Call(q, v, rank, 0, initial_state)).attend
    with without_autocast(q.device.type):
        output, kv, z = run(
            q, k, v, q_factors, k_factors, causal=causal, counts=counts, key_mask=key_mask, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, log_decay=log_decay,
            initial_state=initial_state, normalize=normalize, eps=_representable(eps, q.dtype), relu=relu,
            update_state=update_state,
        )  # fmt: skip
    if not return_state and not update_state:
        return AttentionOutput(output, None)
    return AttentionOutput(output, _final_state(kv, z, log_decay, cu_seqlens, initial_state, update_state))


def leap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_leap: LeapWeights,
    k_leap: LeapWeights,
    *,
    visible: Visible = "all",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    update_state: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> AttentionOutput:
    """LeaPformer attention: ``linear_attention`` of relu(q), relu(k) with factors cos and sin of pi/2 P.

    q [B, T, H, K] and k [B, S, G, K] are the plain projections; P = ``proportion(relu(x), weights)`` is learned, of
    queries by ``q_leap``, of keys by ``k_leap``, and computed in float32 or better. All else as in ``linear_attention``.

    Source: arXiv 2405.13046, eq. 7-9.
    """
    check_arguments(
        q, k, v, None, None, visible, key_mask, cu_seqlens, cu_seqlens_k, log_decay, initial_state, eps,
        normalize=normalize, update_state=update_state, leaps=(q_leap, k_leap),
    )  # fmt: skip
    hidden = max(0 if w1 is None else w1.shape[1] for w1 in (q_leap[0], k_leap[0]))
    fused = _implementation(impl, Call(q, v, 2, hidden, initial_state)).attend_leap
    if fused is None or (log_decay is not None and q.shape[2] != k.shape[2]):
        if key_mask is not None and key_mask.shape == k.shape[:2]:
            k = k.masked_fill(~key_mask[:, :, None, None], 0)  # padding may hold anything; the module must not see it
        q, k = torch.relu(q), torch.relu(k)
        q_factors, k_factors = _leap_factors(q, q_leap), _leap_factors(k, k_leap)
        return linear_attention(
            q, k, v, q_factors, k_factors, visible=visible, key_mask=key_mask, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k, log_decay=log_decay, initial_state=initial_state, return_state=return_state,
            update_state=update_state, normalize=normalize, eps=eps, impl=impl,
        )  # fmt: skip
    causal, counts = _lower_visibility(visible, q, k, cu_seqlens, cu_seqlens_k, log_decay)
    with without_autocast(q.device.type):
        output, kv, z = fused(
            q, k, v, q_leap, k_leap, causal=causal, counts=counts, key_mask=key_mask, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, log_decay=log_decay,
            initial_state=initial_state, normalize=normalize, eps=_representable(eps, q.dtype),
            update_state=update_state,
        )  # fmt: skip
    if not return_state and not update_state:
        return AttentionOutput(output, None)
    return AttentionOutput(output, _final_state(kv, z, log_decay, cu_seqlens, initial_state, update_state))


def linear_state(
    k: Tensor,
    v: Tensor,
    k_factors: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    every: int | None = None,
    initial_state: LinearState | None = None,
) -> LinearState:
    """The state after all keys, or (``every`` = C) after each block of C keys, the last one possibly shorter.

    k [B, S, G, K], v [B, S, G, V], k_factors [B, S, G or 1, R], key_mask bool [B, S] (True = real). At the end: kv
    [B, G, R, K, V] and z [B, G, R, K]; at block boundaries with a block axis after B, n = ceil(S / C) blocks.
    """
    check_tensors(("k", "v", "k_factors"), (k, v, k_factors), k, 2)
    for name, x in (("k", k), ("k_factors", k if k_factors is None else k_factors)):
        if x.dim() != 4:
            expect(False, name, "4 axes [batch, tokens, heads, width]", x.shape)
    q = k[:, :0]
    q_factors = None if k_factors is None else k_factors[:, :0]
    if every is None:
        kwargs = {"key_mask": key_mask, "initial_state": initial_state, "return_state": True}
        state = linear_attention(q, k, v, q_factors, k_factors, **kwargs).state
        assert state is not None
        return state
    expect(isinstance(every, int | torch.SymInt) and every >= 1, "every", "an integer of at least 1", every)
    check_arguments(q, k, v, q_factors, k_factors, "all", key_mask, None, None, None, initial_state, 1.0)
    return _block_states(k, v, k_factors, key_mask, every, initial_state)


def proportion(x: Tensor, weights: LeapWeights) -> Tensor:
    """P = sigmoid(w2 . relu(w1 x + b1) + b2) in [0, 1]: x [B, T, H, K] (already ReLU'd) -> [B, T, H], float32 or better."""
    return torch.sigmoid(_score(x, weights))


def cosine_factors(p: Tensor) -> Tensor:
    """[cos(pi/2 P), sin(pi/2 P)] for P [B, T, H] -> [B, T, H, 2]: cos(pi/2 (a - b)) as a sum of two products.

    Neither is negative for P in [0, 1], and so no normaliser is: cos(pi/2 P) is computed as sin(pi/2 (1 - P)), which is
    exactly 0 for P = 1, where the cosine of the nearest number to pi/2 need not be.
    """
    return torch.stack([1 - p, p], dim=-1).mul(math.pi / 2).sin()


def available_impls() -> dict[str, list[str]]:
    """Each implementation by name, with the reasons why it can't run on this machine: none where it can."""
    return {name: implementation.reasons(None) for name, implementation in _IMPLEMENTATIONS.items()}


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _score(x: Tensor, weights: LeapWeights) -> Tensor:
    """What goes into the sigmoid of a LeaP module: x [B, T, H, K] -> [B, T, H]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        w1, b1, w2, b2 = (None if w is None else w.to(dtype) for w in weights)
        assert w2 is not None and b2 is not None
        x = x.to(dtype)
        if w1 is not None:
            x = torch.relu(_by_head(x, w1) + (0 if b1 is None else b1))
        return _by_head(x, w2[:, None])[..., 0] + b2


def _leap_factors(x: Tensor, weights: LeapWeights) -> Tensor:
    """``cosine_factors(proportion(x, weights))``, and as exact where 1 - P is too small to be seen in P."""
    score = _score(x, weights)
    return torch.stack([-score, score], dim=-1).sigmoid().mul(math.pi / 2).sin()


def _representable(eps: float, dtype: torch.dtype) -> float:
    """``eps``, but no less than the smallest number whose inverse the sums' dtype has: a clamp must not become 0."""
    return max(float(eps), 2.3e-308 if dtype is torch.float64 else 1.2e-38)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, H, K] times weight [1 or H, r, K] -> [B, T, H, r]."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.einsum("bthk,hrk->bthr", x, weight)


def _for_query_heads(x: Tensor, H: int) -> Tensor:
    return x.repeat_interleave(H // x.shape[2], dim=2)


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factors: Tensor | None,
    k_factors: Tensor | None,
    *,
    causal: bool,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    log_decay: Tensor | None,
    initial_state: LinearState | None,
    normalize: bool,
    eps: float,
    relu: bool,
    update_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if relu:
        q, k = torch.relu(q), torch.relu(k)
    if q_factors is None or k_factors is None:
        q_factors, k_factors = q.new_ones(*q.shape[:2], 1, 1), k.new_ones(*k.shape[:2], 1, 1)
    T, S = q.shape[1], k.shape[1]
    parts = [(slice(None), slice(0, T), slice(0, S))]
    if cu_seqlens is not None and cu_seqlens_k is not None:
        queries, keys = boundaries(cu_seqlens, cu_seqlens_k, T, S, same=causal)
        parts = [
            (slice(n, n + 1), slice(*queries[n : n + 2]), slice(*keys[n : n + 2])) for n in range(len(queries) - 1)
        ]
    steps = Staircase.causal()
    results = [
        reference.attend(
            q[:, t], k[:, s], v[:, s], q_factors[:, t], k_factors[:, s],
            counts=steps.counts(t.stop - t.start, s.stop - s.start, device=q.device) if causal
            else None if counts is None else counts[:, t],
            key_mask=None if key_mask is None else key_mask[:, s],
            log_decay=None if log_decay is None else log_decay[:, t],
            initial_state=None if initial_state is None else initial_state.select(row),
            normalize=normalize, eps=eps,
        )
        for row, t, s in parts
    ]  # fmt: skip
    output = torch.cat([out for out, _ in results], dim=1).to(q.dtype)
    return output, torch.cat([state.kv for _, state in results]), torch.cat([state.z for _, state in results])


class _Implementation(NamedTuple):
    """Who computes it; ``reasons`` says why it can't run here (None) or for a call, and is empty where it can."""

    attend: Callable[..., tuple[Tensor, Tensor, Tensor]]
    reasons: Callable[[Call | None], list[str]]
    attend_leap: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None  # with ReLU and the LeaP modules in it


def _no_reasons(call: Call | None) -> list[str]:
    return []


def _native_reasons(call: Call | None) -> list[str]:
    return native.reasons(None if call is None else call.q)


_IMPLEMENTATIONS = {
    "reference": _Implementation(_run_reference, _no_reasons),
    "torch": _Implementation(torch_impl.OPERATOR.attend, _no_reasons),
    "native": _Implementation(native.OPERATOR.attend, _native_reasons, native.OPERATOR.attend_leap),
    "triton": _Implementation(triton_impl.OPERATOR.attend, triton_impl.reasons, triton_impl.OPERATOR.attend_leap),
}


def _implementation(impl: str, call: Call) -> _Implementation:
    if impl == "auto":
        return _chosen(call)
    if impl not in _IMPLEMENTATIONS:
        known = ", ".join(repr(name) for name in ("auto", *_IMPLEMENTATIONS))
        raise ValueError(f"impl: expected one of {known}, got {impl!r}")
    reasons = _IMPLEMENTATIONS[impl].reasons(call)
    if reasons:
        raise ValueError(f"impl: expected one that can run, got {impl!r}, which can't: {'; '.join(reasons)}")
    return _IMPLEMENTATIONS[impl]


def _chosen(call: Call) -> _Implementation:
    """The kernels of the device, or torch; logged when it is chosen for the first time."""
    refused = []
    for name in ("triton" if call.q.device.type == "cuda" else "native", "torch"):
        reasons = _IMPLEMENTATIONS[name].reasons(call)
        if reasons:
            refused.append(f"{name}: {'; '.join(reasons)}")
            continue
        if name not in _announced and not torch.compiler.is_compiling():
            _announced.add(name)
            _log.info("linear attention: impl='auto' uses %r%s", name, f" ({'. '.join(refused)})" if refused else "")
        return _IMPLEMENTATIONS[name]
    raise AssertionError("torch always runs")


def _lower_visibility(
    visible: Visible,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    log_decay: Tensor | None,
) -> tuple[bool, Tensor | None]:
    """(causal, counts): counts int64 [B or 1, T] relative to the own sequence, None for "all" and causal.

    Causal attention means to every implementation that each sequence has as many keys as queries; where packed keys have
    boundaries of their own it is a staircase like others. With a decay it can't be, and implementations refuse.
    """
    if isinstance(visible, str):
        if visible == "all" or log_decay is not None or _same_boundaries(cu_seqlens, cu_seqlens_k):
            return visible == "causal", None
        visible = Staircase.causal()
    T, S = q.shape[1], k.shape[1]
    if cu_seqlens is None:
        if isinstance(visible, Staircase):
            return False, visible.counts(T, S, device=q.device)
        return False, visible.to(torch.int64).clamp(0, S).expand(q.shape[0], T)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    slots = torch.arange(T, device=q.device)
    row = torch.searchsorted(cu_seqlens[1:].to(torch.int64).contiguous(), slots, right=True)
    row = row.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    lengths = cu_seqlens_k.diff().to(torch.int64)[row]
    if not isinstance(visible, Staircase):
        return False, torch.minimum(visible.to(torch.int64).clamp(min=0), lengths[None])
    own = Staircase(*(f.to(q.device)[row] if isinstance(f, Tensor) and f.numel() > 1 else f for f in visible))
    index = slots - cu_seqlens.to(torch.int64)[row]
    return False, own.at(index[:, None], lengths[:, None]).reshape(1, T)


def _same_boundaries(cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> bool:
    """Whether keys are known to be packed as queries are; elsewhere than on the CPU a look would make the device wait."""
    if cu_seqlens_k is None or cu_seqlens is None or cu_seqlens_k is cu_seqlens:
        return True
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return cu_seqlens.tolist() == cu_seqlens_k.tolist()


def _final_state(
    kv: Tensor, z: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, initial_state: LinearState | None,
    update_state: bool,
) -> LinearState:  # fmt: skip
    """The state to return: a new one, or ``initial_state`` with what an implementation has not written there itself."""
    before = None if initial_state is None else initial_state.log_decay
    total = None if log_decay is None else _total_decay(log_decay, cu_seqlens, kv.dtype)
    if not update_state or initial_state is None:
        if before is not None:
            total = before.clone() if total is None else total + before
        return LinearState(kv, z, total)
    for own, new in ((initial_state.kv, kv), (initial_state.z, z)):
        if own is not new:
            own.copy_(new)
    if before is not None and total is not None:
        before.add_(total)
    return initial_state


def _total_decay(log_decay: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The summed log decay [B or N, H] of the stretch."""
    if cu_seqlens is None:
        return log_decay.sum(1, dtype=dtype)
    bounds = cu_seqlens.to(torch.int64)
    slots = torch.arange(log_decay.shape[1], device=log_decay.device)
    row = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    total = log_decay.new_zeros(bounds.shape[0] - 1, log_decay.shape[2], dtype=dtype)
    return total.index_add(0, row, log_decay[0].to(dtype))


def _block_states(
    k: Tensor, v: Tensor, k_factors: Tensor | None, key_mask: Tensor | None, every: int, initial: LinearState | None
) -> LinearState:
    """States after each block, by one batched state per block and a running sum."""
    B, S = k.shape[:2]
    every = min(every, max(1, S))  # what is longer is padded to no more than the keys there are
    n = -(-S // every)

    def by_block(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        padding = [0, 0] * (x.dim() - 2) + [0, n * every - S]
        return F.pad(x, padding).reshape(B * n, every, *x.shape[2:])

    blocks = linear_state(by_block(k), by_block(v), by_block(k_factors), key_mask=by_block(key_mask))  # type: ignore[arg-type]
    kv, z = (field.unflatten(0, (B, n)).cumsum(1) for field in (blocks.kv, blocks.z))
    if initial is not None:
        kv, z = kv + initial.kv[:, None], z + initial.z[:, None]
    if initial is None or initial.log_decay is None:
        return LinearState(kv, z)
    return LinearState(kv, z, initial.log_decay[:, None].expand(B, n, -1).clone())
