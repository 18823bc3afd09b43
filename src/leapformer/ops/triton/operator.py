"""``impl="triton"``: linear attention on a GPU, as PyTorch custom operators around kernels. Letters as in plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops.arguments import ANGLES, MODULES, Arguments, Gradients, Incoming, by_name
from leapformer.ops.implementation import BASIS, Implementation
from leapformer.ops.operator import Operator
from leapformer.ops.triton.limits import INTERPRETED, power_of_two, reasons
from leapformer.ops.triton.plan import (
    Plan,
    Tiles,
    dense,
    kernels,
    launch,
    leap_weights,
    programs,
    segment_tokens,
    strides_of,
)


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _forward(x: Arguments) -> tuple[Tensor, ...]:
    """(output, kv, z, normaliser, states at the segments' starts, scores of queries, and of keys, states of the keys
    beyond the segments' ends where later keys are seen)."""
    plan, q = Plan(x), x.q
    leap = x.q_leap is not None
    q_score = q.new_empty((plan.B, plan.H, plan.T) if leap else (0,), dtype=torch.float32)
    k_score = q.new_empty((plan.B, plan.G, plan.S) if leap else (0,), dtype=torch.float32)
    output = q.new_empty(plan.B, plan.T, plan.H, plan.V)
    normaliser = q.new_empty((plan.B, plan.H, plan.T) if x.normalize else (0,), dtype=torch.float32)
    with _on(q):
        keys = plan.run_module(plan.key_side(score=k_score if leap else None, leap=x.k_leap))
        states, final_kv, final_z = plan.run_states(keys, plan.keys, x.kv, x.z, reverse=False, heads=1, aux=True)
        keys = keys._replace(w2=None)  # by now its scores are stored
        later_states = plan.run_later_states(keys, plan.keys, reverse=True, aux=True)
        queries = plan.run_module(plan.query_side(score=q_score if leap else None, leap=x.q_leap))
        spans = plan.queries, plan.keys
        totals = normaliser if x.normalize else None
        plan.run_read(queries, keys, spans, states, later_states, output, totals, reverse=False)
    later_states = states.new_empty(0) if later_states is None else later_states
    return output, final_kv, final_z, normaliser, states, q_score, k_score, later_states


def _empty(x: Arguments) -> tuple[Tensor, ...]:
    (B, T, H, K), q = x.q.shape, x.q
    S, G, V = x.k.shape[1], x.k.shape[2], x.v.shape[3]
    packed, N, R, leap = x.cu_seqlens is not None, x.sequences, x.rank, x.q_w2 is not None
    M = segment_tokens(S, H if packed else B * H, q.device)
    slots = (S // M if packed else N * (-(-S // M))) + N
    if packed:
        slots = slots + N

    def float32(*shape):
        return q.new_empty(*shape, dtype=torch.float32)

    states = slots, G, R * K * (V + 1)
    return (
        q.new_empty(B, T, H, V),
        float32(N, G, R, K, V),
        float32(N, G, R, K),
        float32(*((B, H, T) if x.normalize else (0,))),
        float32(*states),
        float32(*((B, H, T) if leap else (0,))),
        float32(*((B, G, S) if leap else (0,))),
        float32(*((0,) if x.later_decay is None else states)),
    )


def _backward(x: Arguments, results: Sequence[Tensor], incoming: Incoming) -> Gradients:
    with _on(x.q):
        return _gradients(x, results, incoming)


def _gradients(x: Arguments, results: Sequence[Tensor], incoming: Incoming) -> Gradients:
    output, _kv, _z, normaliser, states, q_score, k_score, later_states = results
    plan, normalize, eps = Plan(x), x.normalize, x.eps
    leap, share = x.q_leap is not None, plan.H // plan.G
    grad, scale, aux = dense(incoming.output), None, None
    if normalize:
        rows = plan.B * plan.T * plan.H
        scale, aux = torch.empty_like(normaliser), torch.empty_like(normaliser)
        block = 16 if INTERPRETED else 32
        launch(
            kernels().numerator_gradients, (-(-rows // block),), grad, strides_of(grad), output, strides_of(output),
            normaliser, scale, aux, plan.T, plan.H, rows, eps, plan.V, BLOCK=block, BV=power_of_two(plan.V),
            num_warps=4,
        )  # fmt: skip
    queries = plan.query_side(w=grad, scale=scale, aux=aux, score=q_score if leap else None)
    keys = plan.key_side(score=k_score if leap else None)
    reverse_states, d_kv, d_z = plan.run_states(
        queries, plan.queries, incoming.kv, incoming.z, reverse=True, heads=share, aux=normalize
    )
    # Queries that see a key from before it: their states run forward.
    earlier_states = plan.run_later_states(queries, plan.queries, reverse=False, aux=normalize)
    later_states = None if x.later_decay is None else later_states
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v))
    forward, backward = (plan.queries, plan.keys), (plan.keys, plan.queries)
    later_query_sums, later_key_sums = plan.run_diagonal(queries, keys)
    dq_factors, query_sums = plan.run_features(
        queries, keys, forward, states, later_states, dq, later_query_sums, reverse=False
    )
    dk_factors, key_sums = plan.run_features(
        keys, queries, backward, reverse_states, earlier_states, dk, later_key_sums, reverse=True
    )
    plan.run_read(keys, queries, backward, reverse_states, earlier_states, dv, None, reverse=True)
    decay = _decay_gradient(plan, states, reverse_states, query_sums, key_sums)
    later = _decay_gradient(plan, earlier_states, later_states, later_key_sums, later_query_sums)
    if later is not None:  # each is that of the step before
        later = plan.first_steps(F.pad(later, (0, 1)))[..., 1:]
    q_weights: list[Tensor | None] = [None] * 4
    k_weights: list[Tensor | None] = [None] * 4
    if x.q_leap is not None and x.k_leap is not None:
        assert dq_factors is not None and dk_factors is not None
        q_weights = _leap_gradients(plan, queries, x.q_leap, dq_factors, dq, None)
        k_weights = _leap_gradients(plan, keys, x.k_leap, dk_factors, dk, plan.mask)
        dq_factors = dk_factors = None
    kind, given = ("factors", x.q_factors) if x.q_angles is None else ("angles", x.q_angles)
    weightings = {
        f"q_{kind}": _for_heads_of(given, dq_factors),
        f"k_{kind}": _for_heads_of(x.k_factors if x.k_angles is None else x.k_angles, dk_factors),
    }
    decays = {"log_decay": decay, "later_decay": later}
    decays = {name: None if steps is None else steps.movedim(-1, 1) for name, steps in decays.items()}
    modules = by_name("q", q_weights) | by_name("k", k_weights)
    return Gradients(dq, dk, dv, kv=d_kv, z=d_z, **weightings, **decays, **modules)


def _for_heads_of(factors: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """From [B, H, R, T] to the gradient of factors, or angles, [B, T, H or 1, R]."""
    if factors is None or gradient is None:
        return None
    return (gradient.sum(1, keepdim=True) if factors.shape[2] == 1 else gradient).movedim(-1, 1)


def _decay_gradient(
    plan: Plan,
    forward_states: Tensor | None,
    reverse_states: Tensor | None,
    to_sums: Tensor | None,
    from_sums: Tensor | None,
) -> Tensor | None:
    """The gradient [B, H, T] of a decay; None without its sums."""
    if to_sums is None or from_sums is None:
        return None
    gradient = to_sums.new_empty(plan.B, plan.H, plan.T)
    launch(
        kernels().decay_gradients, (programs(plan.queries), plan.H), plan.queries, forward_states, reverse_states,
        to_sums, from_sums, gradient, plan.T, plan.H, to_sums.shape[0], from_sums.shape[0], plan.D,
        C=16 if INTERPRETED else 64, BLOCK=min(512, power_of_two(plan.D)), num_warps=4,
    )  # fmt: skip
    return gradient


def _leap_gradients(
    plan: Plan, side: Any, weights: tuple[Tensor | None, ...], d_score: Tensor, dx: Tensor, mask: Tensor | None
) -> list[Tensor | None]:
    """Adds the module's part to dx [B, T, H, K] and returns the gradients of its four weights."""
    w1, b1, w2, b2 = weights
    assert w2 is not None and b2 is not None
    B, T, H, K = side.x.shape
    modules = max(w.shape[0] for w in weights if w is not None)
    r = 0 if w1 is None else w1.shape[1]
    numbers = K + 1 if r == 0 else r * K + 2 * r + 1
    rows, block = (B * T, 16) if modules > 1 else (B * T * H, 16)
    count = max(1, min(-(-rows // block), 256))
    partial = dx.new_empty(count, modules, numbers, dtype=torch.float32)
    launch(
        kernels().leap_gradients, (count, modules), side.x, side.x_strides, side.score, d_score, dx, strides_of(dx),
        mask, leap_weights(weights), partial, T, H, rows, K, numbers, per_head=modules > 1, r=r, BH=power_of_two(r),
        C=block, BK=power_of_two(K), PRECISION=plan.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
    total = partial.sum(0)
    sizes = [K, 1] if r == 0 else [r * K, r, r, 1]
    parts = list(total.split(sizes, dim=1))
    if r == 0:
        parts = [None, None, *parts]
    shaped = []
    for part, weight in zip(parts, weights, strict=True):
        if part is None or weight is None:
            shaped.append(None)
        else:
            part = part.sum(0, keepdim=True) if weight.shape[0] == 1 else part
            shaped.append(part.reshape(weight.shape).clone())  # operators may not return views of one another
    return shaped


def _direct(x: Arguments, update_state: bool) -> tuple[Tensor, ...]:
    if not x.is_step:
        return _forward(x)
    ready = all(t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in (x.kv, x.z))
    return _step(x, x.kv, x.z) if update_state and ready else _step(x)


_TAKES = BASIS | MODULES | ANGLES | {"later_decay"}
OPERATOR = Operator(
    "triton_linear_attention",
    forward=_forward,
    empty=_empty,
    backward=_backward,
    direct=_direct,
    results=8,
    takes=_TAKES,
)
IMPLEMENTATION = Implementation(OPERATOR.attend, takes=_TAKES, limits=reasons)


# ---- one token -------------------------------------------------------------------------------------------------------


def _step(x: Arguments, new_kv: Tensor | None = None, new_z: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output and state of one token, the state written where it is told."""
    plan = Plan(x)
    shape = (plan.B, plan.G, plan.R, plan.K)
    if new_kv is None or new_z is None:
        new_kv = x.q.new_empty(*shape, plan.V, dtype=torch.float32)
        new_z = x.q.new_empty(shape, dtype=torch.float32)
    kv, z = (None if t is None else t.float().contiguous() for t in (x.kv, x.z))
    output = x.q.new_empty(plan.B, 1, plan.H, plan.V)
    score = x.q.new_empty(0, dtype=torch.float32) if x.q_leap is not None else None  # factors come from scores
    BK = power_of_two(plan.K)
    tiles = Tiles(1, BK, max(16, min(power_of_two(plan.V), 4096 // BK)), 4, 1)
    with _on(x.q):
        launch(
            kernels().step, (plan.B, plan.G), plan.query_side(score=score, leap=x.q_leap),
            plan.key_side(score=score, leap=x.k_leap), kv, z, new_kv, new_z, output, strides_of(output), plan.G,
            plan.H // plan.G, x.eps, plan.shape(tiles), NORMALIZE=x.normalize, DECAY=x.log_decay is not None,
            num_warps=4,
        )  # fmt: skip
    return output, new_kv, new_z
