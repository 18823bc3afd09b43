"""The kernels as PyTorch custom operators, with fake implementations and gradients of their own.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R rank, K and V widths, N sequences (B unless packed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops.memory import new_empty
from leapformer.ops.native import problem
from leapformer.ops.native.problem import Gradients, Inputs, Module, Outputs, incoming
from leapformer.ops.state import LinearState

# ---- linear_attention ------------------------------------------------------------------------------------------------


def _linear_inputs(
    q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps,
    relu,
) -> Inputs:  # fmt: skip
    return Inputs(
        q, k, v, q_factors, k_factors, None, None, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k, causal,
        normalize, eps, relu,
    )  # fmt: skip


def _linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factors: Tensor | None,
    k_factors: Tensor | None,
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
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = _linear_inputs(
        q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps,
        relu,
    )  # fmt: skip
    out = empty_outputs(x)
    problem.run("forward", x, out)
    return out  # type: ignore[return-value]


linear_op = torch.library.custom_op("leapformer::native_linear_attention", _linear_forward, mutates_args=())


@linear_op.register_fake
def _linear_fake(*arguments):
    return empty_outputs(_linear_inputs(*arguments))


def _linear_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factors: Tensor | None,
    k_factors: Tensor | None,
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
    relu: bool,
) -> list[Tensor]:
    """Gradients of those of the first eight arguments that are there, in their order."""
    x = _linear_inputs(
        q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps,
        relu,
    )  # fmt: skip
    saved = Outputs(*(t.contiguous() for t in (output, final_kv, final_z, normaliser, checkpoints)))
    grads = empty_gradients(x)
    problem.run("backward", x, saved, incoming(grad, grad_kv, grad_z, saved), grads)
    factors = [
        g if g is None or t is None or t.shape[2] == g.shape[2] else g.sum(2, keepdim=True)
        for g, t in ((grads.q_factors, q_factors), (grads.k_factors, k_factors))
    ]
    found = (grads.q, grads.k, grads.v, *factors, grads.log_decay, grads.kv, grads.z)
    given = (q, k, v, q_factors, k_factors, log_decay, kv, z)
    return [g.to(t.dtype) for g, t in zip(found, given, strict=True) if g is not None and t is not None]


linear_backward_op = torch.library.custom_op(
    "leapformer::native_linear_attention_backward", _linear_backward, mutates_args=()
)


@linear_backward_op.register_fake
def _linear_backward_fake(q, k, v, q_factors, k_factors, log_decay, kv, z, *_):
    return [t.new_empty(t.shape) for t in (q, k, v, q_factors, k_factors, log_decay, kv, z) if t is not None]


def _save(ctx, inputs, output) -> None:
    *tensors, causal, normalize, eps, relu = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[3:])
    # Else every result that got no gradient would get one of zeros, the checkpoints too.
    ctx.set_materialize_grads(False)
    ctx.options = (causal, normalize, eps, relu)


def _linear_autograd(ctx, grad, grad_kv, grad_z, _normaliser, _checkpoints):
    tensors = ctx.saved_tensors  # once: under checkpointing a second reading is an error
    inputs, saved = tensors[:12], tensors[12:]
    grad = torch.zeros_like(saved[0]) if grad is None else grad
    grads = iter(linear_backward_op(*inputs, *saved, grad, grad_kv, grad_z, *ctx.options))
    return (*(None if t is None else next(grads) for t in inputs[:8]), *[None] * 8)


linear_op.register_autograd(_linear_autograd, setup_context=_save)

CUSTOM_OPS = (linear_op, linear_backward_op)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factors: Tensor | None,
    k_factors: Tensor | None,
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
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V] and the final kv and z; arguments checked and lowered by ``leapformer.ops.api``."""
    kv, z = (None, None) if initial_state is None else (initial_state.kv, initial_state.z)
    tensors = (q, k, v, q_factors, k_factors, log_decay, kv, z)
    arguments = (*tensors, key_mask, counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps, relu)
    if needs_operator(tensors):
        return linear_op(*arguments)[:3]
    return run_forward(_linear_inputs(*arguments))


# ---- helpers ---------------------------------------------------------------------------------------------------------


def needs_operator(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a compiler or autograd looks on; otherwise the operator's dispatch is spared."""
    if torch.compiler.is_compiling() or type(tensors[0]) is not Tensor:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final kv and z, without what a backward pass would need."""
    out = empty_outputs(x, save=False)
    one_token = x.q.shape[1] == x.k.shape[1] == 1 and x.counts is None and x.cu_seqlens is None
    problem.run("step" if one_token else "forward", x, out)
    return out[:3]


def empty_outputs(x: Inputs, *, save: bool = True) -> Outputs:
    (B, T, H, K), (G, V) = x.q.shape, x.v.shape[2:]
    wide = torch.float32
    return Outputs(
        new_empty(x.q, (B, T, H, V)),
        x.q.new_empty(x.sequences, G, x.rank, K, V, dtype=wide),
        x.q.new_empty(x.sequences, G, x.rank, K, dtype=wide),
        x.q.new_empty(B, T, H, dtype=wide),
        x.q.new_zeros(x.checkpoints(), dtype=wide) if save else None,
    )


def empty_gradients(x: Inputs) -> Gradients:
    """Memory for all gradients; those of LeaP modules are added to, so they start from 0."""

    def like(t: Tensor | None, heads: int | None = None) -> Tensor | None:
        if t is None:
            return None
        shape = t.shape if heads is None else (*t.shape[:2], heads, *t.shape[3:])
        return new_empty(x.q, shape, torch.float32)

    def module(weights: Module | None, heads: int) -> Tensor | None:
        if weights is None:
            return None
        size = sum(w[0].numel() for w in weights if w is not None)
        if weights.w1 is not None and weights.b1 is None:
            size += weights.w1.shape[1]  # the kernels always have a bias
        return x.q.new_zeros(x.slots, heads, size, dtype=torch.float32)

    H, G = x.q.shape[2], x.k.shape[2]
    q, k, v = (new_empty(t, t.shape) for t in (x.q, x.k, x.v))
    return Gradients(
        q, k, v, like(x.q_factors, H), like(x.k_factors, G), module(x.q_leap, H), module(x.k_leap, G),
        like(x.log_decay), like(x.kv), like(x.z),
    )  # fmt: skip
