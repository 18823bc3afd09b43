"""The kernels as a PyTorch custom operator: memory for what they write, and gradients in the shapes of the arguments.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K and V widths, r hidden units of a LeaP module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapformer.ops.arguments import ANGLES, MODULES, Arguments, Gradients, Incoming, LeapWeights, by_name
from leapformer.ops.implementation import BASIS, Implementation
from leapformer.ops.memory import new_empty
from leapformer.ops.native import problem
from leapformer.ops.native.library import reasons
from leapformer.ops.native.problem import GradientBuffers, Outputs, both_halves
from leapformer.ops.operator import Operator

Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # w1, b1, w2 and b2 of a LeaP module

_NO_CHECKPOINTS = torch.empty(0)  # one for all calls: it has no memory, and its address is 0


def _forward(x: Arguments) -> Outputs:
    out = _empty_outputs(x)
    problem.run("forward", x, out)
    return out


def _direct(x: Arguments, update_state: bool) -> Outputs:
    """Without what a backward pass would need. The kernels have read a head's state before they write its new one."""
    kv = x.kv if update_state and problem.is_ready(x.kv) else None
    z = x.z if update_state and problem.is_ready(x.z) else None
    out = _empty_outputs(x, kv, z, save=False)
    problem.run("step" if x.is_step else "forward", x, out)
    return out


def _backward(x: Arguments, results: Sequence[Tensor], incoming: Incoming) -> Gradients:
    saved, grads = Outputs(*(t.contiguous() for t in results)), _empty_gradients(x)
    problem.run("backward", x, saved, both_halves(incoming, saved), grads)
    kind = "factors" if x.q_angles is None else "angles"
    given = _factors(x)
    of_factors = {f"{side}_{kind}": _over_heads(g, t) for side, g, t in zip("qk", grads[3:5], given, strict=True)}
    q_weights, k_weights = _module_gradients(x.q_leap, grads.q_leap), _module_gradients(x.k_leap, grads.k_leap)
    return Gradients(
        grads.q,
        grads.k,
        grads.v,
        **of_factors,
        log_decay=grads.log_decay,
        later_decay=grads.later_decay,
        kv=grads.kv,
        z=grads.z,
        **by_name("q", q_weights),
        **by_name("k", k_weights),
    )


def _factors(x: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """The factors of queries and keys, or the angles in their place."""
    return (x.q_factors, x.k_factors) if x.q_angles is None else (x.q_angles, x.k_angles)


def _over_heads(gradient: Tensor | None, factors: Tensor | None) -> Tensor | None:
    """Summed where all heads have the same factors."""
    if gradient is None or factors is None or factors.shape[2] == gradient.shape[2]:
        return gradient
    return gradient.sum(2, keepdim=True)


def _empty_outputs(x: Arguments, kv: Tensor | None = None, z: Tensor | None = None, *, save: bool = True) -> Outputs:
    """Memory for all results; the final state goes into ``kv`` and ``z`` where they are given."""
    (B, T, H, K), (G, V) = x.q.shape, x.v.shape[2:]
    wide = torch.float32
    return Outputs(
        new_empty(x.q, (B, T, H, V)),
        x.q.new_empty(x.sequences, G, x.rank, K, V, dtype=wide) if kv is None else kv,
        x.q.new_empty(x.sequences, G, x.rank, K, dtype=wide) if z is None else z,
        x.q.new_empty(B, T, H, dtype=wide),
        x.q.new_zeros(problem.checkpoints(x), dtype=wide) if save else _NO_CHECKPOINTS,
    )


def _empty_gradients(x: Arguments) -> GradientBuffers:
    """Memory for all gradients; those of LeaP modules are added to, so they start from 0."""

    def like(t: Tensor | None, heads: int | None = None) -> Tensor | None:
        if t is None:
            return None
        shape = t.shape if heads is None else (*t.shape[:2], heads, *t.shape[3:])
        return new_empty(x.q, shape, torch.float32)

    def module(weights: LeapWeights | None, heads: int) -> Tensor | None:
        if weights is None:
            return None
        size = sum(w[0].numel() for w in weights if w is not None)
        if weights.w1 is not None and weights.b1 is None:
            size += weights.w1.shape[1]  # the kernels always have a bias
        return x.q.new_zeros(problem.slots(x, problem.pieces(x)), heads, size, dtype=torch.float32)

    H, G = x.q.shape[2], x.k.shape[2]
    q, k, v = (new_empty(t, t.shape) for t in (x.q, x.k, x.v))
    q_factors, k_factors = _factors(x)
    return GradientBuffers(
        q,
        k,
        v,
        like(q_factors, H),
        like(k_factors, G),
        module(x.q_leap, H),
        module(x.k_leap, G),
        like(x.log_decay),
        like(x.later_decay),
        like(x.kv),
        like(x.z),
    )


def _module_gradients(module: LeapWeights | None, partial: Tensor | None) -> Weights:
    """From [slots, heads, w1 b1 w2 b2 behind one another] to a gradient for each weight."""
    if module is None or partial is None:
        return None, None, None, None
    total = partial.sum(0)
    if module.w2.shape[0] == 1:
        total = total.sum(0, keepdim=True)
    n = total.shape[0]
    r, K = (0, module.w2.shape[1]) if module.w1 is None else module.w1.shape[1:]
    # Copies: what an operator returns must not share memory.
    w1, b1, w2, b2 = (part.clone() for part in total.split([r * K, r, r or K, 1], dim=1))
    if module.w1 is None:
        return None, None, w2, b2.reshape(n)
    return w1.reshape(n, r, K), None if module.b1 is None else b1, w2, b2.reshape(n)


TAKES = BASIS | MODULES | ANGLES | {"later_decay"}
OPERATOR = Operator(
    "native_linear_attention",
    forward=_forward,
    empty=_empty_outputs,
    backward=_backward,
    direct=_direct,
    results=5,
    takes=TAKES,
)
IMPLEMENTATION = Implementation(OPERATOR.attend, takes=TAKES, limits=reasons)
