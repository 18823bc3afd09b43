"""The public doors of linear attention: arguments are checked once, here, and handed to one implementation.

Letters: B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), R rank of the re-weighting,
K key width, V value width, N packed sequences.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops import native, reference, torch_impl, triton
from leapformer.ops.arguments import Arguments, LeapWeights
from leapformer.ops.autocast import without_autocast
from leapformer.ops.checks import check_arguments, check_tensors, expect, module_weights, state_tensors
from leapformer.ops.decay import total_decay
from leapformer.ops.implementation import Implementation
from leapformer.ops.lowering import fit, is_causal, leap_score, lower
from leapformer.ops.state import LinearState
from leapformer.ops.visibility import Visible

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
    q_angles: Tensor | None = None,
    k_angles: Tensor | None = None,
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
        q_angles: [B, T, H or 1, m] and k_angles [B, S, G or 1, m], both or neither, any floating dtype: in place of
            factors, for sigma(i, j) = sum_m cos(q_angles[i, m] - k_angles[j, m]), which is of rank R = 2 m, the cosines
            first. It may be negative, so it goes with ``normalize=False``.
        log_decay: [B, T, H] <= 0; the state is multiplied by exp(log_decay[t]) before key t is added. Where later keys
            are seen too (T = S and "all", or blocks and all before them) a weight is multiplied by the decay between
            the two tokens: exp of the sum over j < t <= i for an earlier key j, over i <= t < j for a later one.
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
        ValueError: an argument does not fit, or a named implementation can't run; the message says what was expected
            and got.

    Source: arXiv 2405.13046, eq. 5-8; arXiv 2202.08791, eq. 10; arXiv 2006.16236, eq. 4-9.
    """
    kv, z = state_tensors(initial_state)
    x = Arguments(
        q=q,
        k=k,
        v=v,
        q_factors=q_factors,
        k_factors=k_factors,
        q_angles=q_angles,
        k_angles=k_angles,
        log_decay=log_decay,
        kv=kv,
        z=z,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        causal=is_causal(visible),
        normalize=normalize,
        eps=eps,
        relu=relu,
    )
    return _attend(x, visible, initial_state, impl, return_state, update_state)


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
    queries by ``q_leap``, of keys by ``k_leap``, and computed in float32 or better. All else as in
    ``linear_attention``.

    Source: arXiv 2405.13046, eq. 7-9.
    """
    kv, z = state_tensors(initial_state)
    q_w1, q_b1, q_w2, q_b2 = module_weights("q_leap", q_leap)
    k_w1, k_b1, k_w2, k_b2 = module_weights("k_leap", k_leap)
    x = Arguments(
        q=q,
        k=k,
        v=v,
        q_w1=q_w1,
        q_b1=q_b1,
        q_w2=q_w2,
        q_b2=q_b2,
        k_w1=k_w1,
        k_b1=k_b1,
        k_w2=k_w2,
        k_b2=k_b2,
        log_decay=log_decay,
        kv=kv,
        z=z,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        causal=is_causal(visible),
        normalize=normalize,
        eps=eps,
        relu=True,
    )
    return _attend(x, visible, initial_state, impl, return_state, update_state)


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
    kv, z = state_tensors(initial_state)
    x = Arguments(q, k, v, q_factors, k_factors, kv=kv, z=z, key_mask=key_mask)
    check_arguments(x, "all", initial_state)
    return _block_states(k, v, k_factors, key_mask, every, initial_state)


def proportion(x: Tensor, weights: LeapWeights) -> Tensor:
    """P = sigmoid(w2 . relu(w1 x + b1) + b2) in [0, 1]: x [B, T, H, K] (already ReLU'd) -> [B, T, H], float32 or
    better."""
    return torch.sigmoid(leap_score(x, weights))


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


def _attend(
    x: Arguments, visible: Visible, initial_state: LinearState | None, impl: str, return_state: bool, update_state: bool
) -> AttentionOutput:
    """What both doors do with their arguments; ``x`` as they were given, with ``causal`` where ``visible`` says so."""
    check_arguments(x, visible, initial_state, update_state)
    x = lower(x, visible)
    chosen = _implementation(impl, x)
    with without_autocast(x.q.device.type):
        x = fit(x, chosen.takes_modules, chosen.takes_angles)
        output, kv, z = chosen.attend(x, update_state)
    if not return_state and not update_state:
        return AttentionOutput(output, None)
    return AttentionOutput(output, _final_state(x, kv, z, initial_state, update_state))


_IMPLEMENTATIONS = {
    "reference": reference.IMPLEMENTATION,
    "torch": torch_impl.IMPLEMENTATION,
    "native": native.IMPLEMENTATION,
    "triton": triton.IMPLEMENTATION,
}


def _implementation(impl: str, x: Arguments) -> Implementation:
    if impl == "auto":
        return _chosen(x)
    if impl not in _IMPLEMENTATIONS:
        known = ", ".join(repr(name) for name in ("auto", *_IMPLEMENTATIONS))
        raise ValueError(f"impl: expected one of {known}, got {impl!r}")
    reasons = _IMPLEMENTATIONS[impl].reasons(x)
    if reasons:
        raise ValueError(f"impl: expected one that can run, got {impl!r}, which can't: {'; '.join(reasons)}")
    return _IMPLEMENTATIONS[impl]


def _chosen(x: Arguments) -> Implementation:
    """The kernels of the device, or torch; logged when it is chosen for the first time."""
    refused = []
    for name in ("triton" if x.q.device.type == "cuda" else "native", "torch"):
        reasons = _IMPLEMENTATIONS[name].reasons(x)
        if reasons:
            refused.append(f"{name}: {'; '.join(reasons)}")
            continue
        if name not in _announced and not torch.compiler.is_compiling():
            _announced.add(name)
            _log.info("linear attention: impl='auto' uses %r%s", name, f" ({'. '.join(refused)})" if refused else "")
        return _IMPLEMENTATIONS[name]
    raise ValueError(f"impl: expected one that can run, got 'auto', and none can: {'. '.join(refused)}")


def _final_state(
    x: Arguments, kv: Tensor, z: Tensor, initial_state: LinearState | None, update_state: bool
) -> LinearState:
    """The state to return: a new one, or ``initial_state`` with what an implementation has not written there itself."""
    before = None if initial_state is None else initial_state.log_decay
    total = None if x.log_decay is None else total_decay(x.log_decay, x.cu_seqlens, kv.dtype)
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


def _block_states(
    k: Tensor, v: Tensor, k_factors: Tensor | None, key_mask: Tensor | None, every: int, initial: LinearState | None
) -> LinearState:
    """States after each block, by one batched state per block and a running sum."""
    B, S = k.shape[:2]
    every = min(every, max(1, S))  # what is longer is padded to no more than the keys there are
    n = -(-S // every)

    def by_block(x: Tensor | None) -> Any:
        if x is None:
            return None
        padding = [0, 0] * (x.dim() - 2) + [0, n * every - S]
        return F.pad(x, padding).reshape(B * n, every, *x.shape[2:])

    blocks = linear_state(by_block(k), by_block(v), by_block(k_factors), key_mask=by_block(key_mask))
    kv, z = (field.unflatten(0, (B, n)).cumsum(1) for field in (blocks.kv, blocks.z))
    if initial is not None:
        kv, z = kv + initial.kv[:, None], z + initial.z[:, None]
    if initial is None or initial.log_decay is None:
        return LinearState(kv, z)
    return LinearState(kv, z, initial.log_decay[:, None].expand(B, n, -1).clone())
