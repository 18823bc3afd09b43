"""``impl="torch"`` as a PyTorch custom operator: linear time and memory, own gradient, every argument, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapformer.ops import layouts
from leapformer.ops.arguments import Arguments
from leapformer.ops.chunks import Forward, Inputs
from leapformer.ops.layouts import Options
from leapformer.ops.operator import Operator


def _forward(x: Arguments) -> Forward:
    inputs, options = _split(x)
    if x.cu_seqlens is not None and x.cu_seqlens_k is not None:
        return layouts.packed_forward(inputs, x.cu_seqlens, x.cu_seqlens_k, options)
    return layouts.forward(inputs, options)


def _empty(x: Arguments) -> tuple[Tensor, ...]:
    (B, T, H, K), (G, V) = x.q.shape, x.v.shape[2:]
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    return (
        x.q.new_empty(B, T, H, V),
        x.q.new_empty(x.sequences, G, x.rank, K, V, dtype=dtype),
        x.q.new_empty(x.sequences, G, x.rank, K, dtype=dtype),
        x.q.new_empty(B, T if x.normalize else 0, H, dtype=dtype),
    )


def _backward(
    x: Arguments, results: Sequence[Tensor], grad: Tensor, grad_kv: Tensor | None, grad_z: Tensor | None
) -> list[Tensor | None]:
    (inputs, options), saved = _split(x), Forward(*results)
    if x.cu_seqlens is not None and x.cu_seqlens_k is not None:
        grads = layouts.packed_backward(inputs, x.cu_seqlens, x.cu_seqlens_k, saved, grad, grad_kv, grad_z, options)
    else:
        grads = layouts.backward(inputs, saved, grad, grad_kv, grad_z, options)
    return [*grads, *[None] * 8]


def _split(x: Arguments) -> tuple[Inputs, Options]:
    """What the dense core takes, and how it is laid out."""
    return Inputs(*x[:8], x.key_mask, x.relu), Options(x.causal, x.counts, x.normalize, x.eps)


OPERATOR = Operator(
    "linear_attention", forward=_forward, empty=_empty, backward=_backward,
    direct=lambda x, update_state: _forward(x), results=4, takes_leap=False,
)  # fmt: skip
