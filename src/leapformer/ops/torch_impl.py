"""``impl="torch"`` as PyTorch custom operators: linear time and memory, own gradient, every argument, any device.

Letters as in chunks.py. The operators exist so that torch.compile and torch.export see one opaque call with known shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops import layouts
from leapformer.ops.autocast import without_autocast
from leapformer.ops.chunks import Forward, Inputs
from leapformer.ops.layouts import Options
from leapformer.ops.state import LinearState


def _forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = Inputs(q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, relu)
    options = Options(causal, counts, normalize, eps)
    if cu_seqlens is not None and cu_seqlens_k is not None:
        result = layouts.packed_forward(x, cu_seqlens, cu_seqlens_k, options)
    else:
        result = layouts.forward(x, options)
    return result.output, result.kv, result.z, result.normaliser


forward_op = torch.library.custom_op("leapformer::linear_attention", _forward, mutates_args=())


@forward_op.register_fake
def _forward_fake(
    q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k, causal, normalize, eps, relu,
):  # fmt: skip
    B, T, H, K = q.shape
    G, V = v.shape[2], v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    R = 1 if q_factors is None else q_factors.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(B, T, H, V),
        q.new_empty(N, G, R, K, V, dtype=dtype),
        q.new_empty(N, G, R, K, dtype=dtype),
        q.new_empty(B, T if normalize else 0, H, dtype=dtype),
    )


def _backward(
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
    grad: Tensor,
    grad_kv: Tensor | None,
    grad_z: Tensor | None,
    causal: bool,
    normalize: bool,
    eps: float,
    relu: bool,
) -> list[Tensor]:
    """Gradients of those of the first eight arguments that are there, in their order."""
    x = Inputs(q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, relu)
    saved = Forward(output, final_kv, final_z, normaliser)
    options = Options(causal, counts, normalize, eps)
    with without_autocast(q.device.type):
        if cu_seqlens is not None and cu_seqlens_k is not None:
            grads = layouts.packed_backward(x, cu_seqlens, cu_seqlens_k, saved, grad, grad_kv, grad_z, options)
        else:
            grads = layouts.backward(x, saved, grad, grad_kv, grad_z, options)
    return [g.to(t.dtype) for g, t in zip(grads, x.differentiable, strict=True) if t is not None and g is not None]


backward_op = torch.library.custom_op("leapformer::linear_attention_backward", _backward, mutates_args=())


@backward_op.register_fake
def _backward_fake(q, k, v, q_factors, k_factors, log_decay, kv, z, *_):
    present = (q, k, v, q_factors, k_factors, log_decay, kv, z)
    return [t.new_empty(t.shape) for t in present if t is not None]


def _save(ctx, inputs, output) -> None:
    *tensors, causal, normalize, eps, relu = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[3])
    # Nobody asks for the final state in training; then its gradient is not a tensor of zeros but none.
    ctx.set_materialize_grads(False)
    ctx.options = (causal, normalize, eps, relu)


def _autograd(ctx, grad, grad_kv, grad_z, _grad_normaliser):
    tensors = ctx.saved_tensors
    inputs, (output, kv, z, normaliser) = tensors[:12], tensors[12:]
    grad = torch.zeros_like(output) if grad is None else grad
    grads = iter(backward_op(*inputs, output, kv, z, normaliser, grad, grad_kv, grad_z, *ctx.options))
    return (*(None if t is None else next(grads) for t in inputs[:8]), *[None] * 8)


forward_op.register_autograd(_autograd, setup_context=_save)

CUSTOM_OPS = (forward_op, backward_op)


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
    """Output [B,T,H,V] and the final kv and z; arguments checked and lowered by ``leapformer.ops.api``."""
    kv, z = (None, None) if initial_state is None else (initial_state.kv, initial_state.z)
    arguments = (q, k, v, q_factors, k_factors, log_decay, kv, z, key_mask, counts, cu_seqlens, cu_seqlens_k)
    # Eager work without gradients skips the operator's dispatch, which costs more than one token's arithmetic.
    direct = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    output, kv, z, _ = (_forward if direct else forward_op)(*arguments, causal, normalize, eps, relu)
    return output, kv, z
