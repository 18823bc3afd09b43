"""``leap_attention`` as one kernel: ReLU, LeaP modules and cosine are computed tile by tile, and so are their gradients.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, r hidden units, K and V widths, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops.native import problem
from leapformer.ops.native.operators import empty_gradients, empty_outputs, needs_operator, run_forward
from leapformer.ops.native.problem import Inputs, Module, Outputs, incoming
from leapformer.ops.state import LinearState


def _inputs(
    q, k, v, q_w1, q_b1, q_w2, q_b2, k_w1, k_b1, k_w2, k_b2, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k,
    causal, normalize, eps,
) -> Inputs:  # fmt: skip
    return Inputs(
        q, k, v, None, None, Module(q_w1, q_b1, q_w2, q_b2), Module(k_w1, k_b1, k_w2, k_b2), log_decay, kv, z, key_mask,
        counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps, True,
    )  # fmt: skip


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_w1: Tensor | None,
    q_b1: Tensor | None,
    q_w2: Tensor,
    q_b2: Tensor,
    k_w1: Tensor | None,
    k_b1: Tensor | None,
    k_w2: Tensor,
    k_b2: Tensor,
    log_decay: Tensor | None,
    kv: Tensor | None,
    z: Tensor | None,
    key_mask: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = _inputs(
        q, k, v, q_w1, q_b1, q_w2, q_b2, k_w1, k_b1, k_w2, k_b2, log_decay, kv, z, key_mask, counts, cu_seqlens,
        cu_seqlens_k, causal, normalize, eps,
    )  # fmt: skip
    out = empty_outputs(x)
    problem.run("forward", x, out)
    return out  # type: ignore[return-value]


leap_op = torch.library.custom_op("leapformer::leap_attention", _forward, mutates_args=())


@leap_op.register_fake
def _fake(*arguments):
    return empty_outputs(_inputs(*arguments))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_w1: Tensor | None,
    q_b1: Tensor | None,
    q_w2: Tensor,
    q_b2: Tensor,
    k_w1: Tensor | None,
    k_b1: Tensor | None,
    k_w2: Tensor,
    k_b2: Tensor,
    log_decay: Tensor | None,
    kv: Tensor | None,
    z: Tensor | None,
    key_mask: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    output: Tensor,
    final_kv: Tensor,
    final_z: Tensor,
    normaliser: Tensor,
    checkpoints: Tensor,
    grad: Tensor,
    grad_kv: Tensor | None,
    grad_z: Tensor | None,
    causal: bool,
    normalize: bool,
    eps: float,
) -> list[Tensor]:
    """Gradients of those of the first fourteen arguments that are there, in their order."""
    x = _inputs(
        q, k, v, q_w1, q_b1, q_w2, q_b2, k_w1, k_b1, k_w2, k_b2, log_decay, kv, z, key_mask, counts, cu_seqlens,
        cu_seqlens_k, causal, normalize, eps,
    )  # fmt: skip
    saved = Outputs(*(t.contiguous() for t in (output, final_kv, final_z, normaliser, checkpoints)))
    grads = empty_gradients(x)
    problem.run("backward", x, saved, incoming(grad, grad_kv, grad_z, saved), grads)
    assert x.q_leap is not None and x.k_leap is not None and grads.q_leap is not None and grads.k_leap is not None
    modules = [*_module_gradients(x.q_leap, grads.q_leap), *_module_gradients(x.k_leap, grads.k_leap)]
    found = (grads.q, grads.k, grads.v, *modules, grads.log_decay, grads.kv, grads.z)
    given = (q, k, v, *x.q_leap, *x.k_leap, log_decay, kv, z)
    return [g.to(t.dtype) for g, t in zip(found, given, strict=True) if g is not None and t is not None]


def _module_gradients(module: Module, partial: Tensor) -> list[Tensor | None]:
    """From [slots, heads, w1 b1 w2 b2 behind one another] to a gradient for each weight."""
    total = partial.sum(0)
    if module.w2.shape[0] == 1:
        total = total.sum(0, keepdim=True)
    n = total.shape[0]
    r, K = (0, module.w2.shape[1]) if module.w1 is None else module.w1.shape[1:]
    # Copies: what an operator returns must not share memory.
    w1, b1, w2, b2 = (part.clone() for part in total.split([r * K, r, r or K, 1], dim=1))
    without_hidden = module.w1 is None
    return [
        None if without_hidden else w1.reshape(n, r, K), None if without_hidden or module.b1 is None else b1, w2,
        b2.reshape(n),
    ]  # fmt: skip


leap_backward_op = torch.library.custom_op("leapformer::leap_attention_backward", _backward, mutates_args=())


@leap_backward_op.register_fake
def _backward_fake(*arguments):
    return [t.new_empty(t.shape) for t in arguments[:14] if t is not None]


def _save(ctx, inputs, output) -> None:
    *tensors, causal, normalize, eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[3:])
    # Else every result that got no gradient would get one of zeros, the checkpoints too.
    ctx.set_materialize_grads(False)
    ctx.options = (causal, normalize, eps)


def _autograd(ctx, grad, grad_kv, grad_z, _normaliser, _checkpoints):
    tensors = ctx.saved_tensors  # once: under checkpointing a second reading is an error
    inputs, saved = tensors[:18], tensors[18:]
    grad = torch.zeros_like(saved[0]) if grad is None else grad
    grads = iter(leap_backward_op(*inputs, *saved, grad, grad_kv, grad_z, *ctx.options))
    return (*(None if t is None else next(grads) for t in inputs[:14]), *[None] * 7)


leap_op.register_autograd(_autograd, setup_context=_save)

CUSTOM_OPS = (leap_op, leap_backward_op)


def attend_leap(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_leap: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    k_leap: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    *,
    causal: bool,
    counts: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    log_decay: Tensor | None,
    initial_state: LinearState | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``operators.attend``, of plain projections q and k and the weights of two LeaP modules."""
    kv, z = (None, None) if initial_state is None else (initial_state.kv, initial_state.z)
    tensors = (q, k, v, *q_leap, *k_leap, log_decay, kv, z)
    arguments = (*tensors, key_mask, counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps)
    if needs_operator(tensors):
        return leap_op(*arguments)[:3]
    return run_forward(_inputs(*arguments))
