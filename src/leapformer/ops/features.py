"""Features and values of a block, and from their gradients to those of what they are made of.

Letters: n chunks of a block of B samples and G key/value heads, r query heads for each of these, C tokens of a chunk, K
key width, F = R K feature width, V value width, m = n B G matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapformer.ops.arguments import Arguments, Gradients
from leapformer.ops.blocking import Block, view
from leapformer.ops.buffers import Room


def query_features(x: Arguments, block: Block, room: Room) -> Tensor:
    """phi_q [m, r C, F]."""
    return _features(x.q, x.q_factors, block, x.k.shape[2], room.phi_q, room.relu_q if x.relu else None)


def keys_and_values(x: Arguments, block: Block, room: Room) -> tuple[Tensor, Tensor]:
    """phi_k [m, C, F] and v [m, C, V], zero where masked."""
    G = x.k.shape[2]
    phi = _features(x.k, x.k_factors, block, G, room.phi_k, room.relu_k if x.relu else None)
    v = _features(x.v, None, block, G, room.v)
    if x.key_mask is not None:
        hidden = ~view(x.key_mask[..., None], block, G).squeeze(3)
        for keys in (phi, v):
            keys.view(block.n, block.B, block.G, *keys.shape[1:]).masked_fill_(hidden, 0)
    return phi, v


def write_query_gradient(x: Arguments, block: Block, grads: Gradients, room: Room) -> None:
    _write_feature_gradient(
        room.grad_phi_q,
        block,
        x.q,
        x.q_factors,
        grads.q,
        grads.q_factors,
        x.k.shape[2],
        room.product_q,
        room.relu_q if x.relu else None,
    )


def write_key_gradient(x: Arguments, block: Block, grads: Gradients, room: Room) -> None:
    """Of keys and values."""
    target = view(grads.v, block, x.k.shape[2])
    target.copy_(room.grad_v.view(target.shape))
    _write_feature_gradient(
        room.grad_phi_k,
        block,
        x.k,
        x.k_factors,
        grads.k,
        grads.k_factors,
        x.k.shape[2],
        room.product_k,
        room.relu_k if x.relu else None,
    )


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _features(
    x: Tensor, factors: Tensor | None, block: Block, groups: int, out: Tensor, relu: Tensor | None = None
) -> Tensor:
    """phi = factors (x) x into out [m, r C, F]; of relu(x), which is left in ``relu`` [n, B, G, r, C, K], where
    given."""
    tokens = view(x, block, groups)
    if relu is not None:
        same = tokens.dtype == relu.dtype
        tokens = torch.clamp(tokens, min=0, out=relu) if same else relu.copy_(tokens).clamp_(min=0)
    if factors is None:
        out.view(tokens.shape).copy_(tokens)
        return out
    phi = out.view(*tokens.shape[:-1], factors.shape[-1], tokens.shape[-1])
    by_rank = view(factors, block, groups).split(1, dim=-1)
    for rank, f in enumerate(by_rank):  # three times as fast as one product that broadcasts over both
        torch.mul(tokens, f, out=phi[..., rank, :])
    return out


def _write_feature_gradient(
    grad_phi: Tensor,
    block: Block,
    x: Tensor,
    factors: Tensor | None,
    grad_x: Tensor,
    grad_factors: Tensor | None,
    groups: int,
    product: Tensor,
    relu: Tensor | None,
) -> None:
    """From the gradient of phi [m, r C, F], which is overwritten, to those of x (sum over the rank) and of its factors
    (over the width); ``product`` [n, B, G, r, C, K] is room for a temporary, ``relu`` is relu(x) where phi is made of
    it."""
    target = view(grad_x, block, groups)
    if factors is None or grad_factors is None:
        _write_through_relu(grad_phi.view(target.shape), relu, target)
        return
    tokens = view(x, block, groups) if relu is None else relu
    f = view(factors, block, groups).split(1, dim=-1)
    by_rank = grad_phi.view(*target.shape[:-1], len(f), target.shape[-1]).unbind(-2)
    by_factor = [torch.mul(part, tokens, out=product).sum(-1) for part in by_rank]
    for part, factor in zip(by_rank, f, strict=True):
        part.mul_(factor)
    for part in by_rank[1:]:
        by_rank[0].add_(part)
    _write_through_relu(by_rank[0], relu, target)
    # Factors that heads share get the sum over them, of which this block may hold a part.
    grad_f, by_factor = view(grad_factors, block, groups), torch.stack(by_factor, dim=-1)
    grad_f.add_(by_factor.sum((2, 3), keepdim=True) if factors.shape[2] == 1 else by_factor)


def _write_through_relu(grad: Tensor, relu: Tensor | None, target: Tensor) -> None:
    """Where there was a ReLU, whose result is ``relu``, its gradient; else a copy."""
    if relu is None:
        target.copy_(grad)
    elif target.dtype == grad.dtype:
        torch.ops.aten.threshold_backward.grad_input(grad, relu, 0, grad_input=target)
    else:
        target.copy_(torch.ops.aten.threshold_backward(grad, relu, 0))
