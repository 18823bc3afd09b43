"""Linear attention in linear time and memory with batched matrix products: the dense core and its gradient.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, r = H/G, R rank, K key width, F = R K feature
width, V value width, C tokens of a chunk, n chunks of a block, M = n C tokens of a block.

The normaliser is one more value channel that is 1 everywhere: with w = [v, 1] a single state [F, V + 1] holds numerator
and normaliser, and every product computes both. Causal attention goes block by block so that temporaries stay in cache:

    P = (phi_q phi_k^T) * D          num = P w + e_q (phi_q S)          S' = e_C S + phi_k^T (e_k w)

with D the causal mask (times the decay between two tokens of a chunk), e_q the decay since the chunk began, e_k the decay
up to its end, e_C that of the whole chunk. D, e_q, e_k and e_C never exceed 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
BLOCK_TOKENS = 1024  # tokens times heads of a block: about what keeps its temporaries in a core's cache


class Inputs(NamedTuple):
    """What one call attends over. q [B,T,H,K], k [B,S,G,K], v [B,S,G,V], q_factors [B,T,H|1,R], k_factors [B,S,G|1,R],
    log_decay [B,T,H] (then G = H), kv [B,G,R,K,V] and z [B,G,R,K] the initial state, key_mask [B,S] (True = real)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factors: Tensor | None
    k_factors: Tensor | None
    log_decay: Tensor | None
    kv: Tensor | None
    z: Tensor | None
    key_mask: Tensor | None

    @property
    def rank(self) -> int:
        return 1 if self.q_factors is None else self.q_factors.shape[-1]

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)


class Gradients(NamedTuple):
    """One gradient for each differentiable field of ``Inputs``, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factors: Tensor | None
    k_factors: Tensor | None
    log_decay: Tensor | None
    kv: Tensor | None
    z: Tensor | None


class Forward(NamedTuple):
    """output [B,T,H,V] in the input dtype; kv, z the final state and normaliser [B,T,H], unclamped, at least float32."""

    output: Tensor
    kv: Tensor
    z: Tensor
    normaliser: Tensor


class Block(NamedTuple):
    """n chunks of C tokens from token ``start`` on."""

    start: int
    n: int
    C: int


def forward(x: Inputs, *, causal: bool, normalize: bool, eps: float) -> Forward:
    """Attention where every query sees all keys, or (``causal``, T = S) those up to its own slot."""
    B, T, H, _ = x.q.shape
    result = Forward(
        x.q.new_empty(B, T, H, x.v.shape[-1]),
        *_split_state(_initial_state(x), x),
        x.q.new_empty(B, T, H, dtype=x.compute_dtype),
    )
    if causal:
        state = _initial_state(x)
        for block in causal_blocks(T, B * H):
            numerator, state = _causal_block(x, block, state)
            _finish(numerator, block, result, normalize, eps)
    else:
        state = _initial_state(x)
        for block in wide_blocks(x.k.shape[1], B * H):
            w = _values(x, block)
            state = state + (_key_features(x, block).transpose(-1, -2) @ w)[0]
        for block in wide_blocks(T, B * H):
            _finish(_query_features(x, block) @ state, block, result, normalize, eps)
    kv, z = _split_state(state, x)
    return Forward(result.output, kv, z, result.normaliser)


def backward(
    x: Inputs,
    saved: Forward,
    grad: Tensor,
    grad_kv: Tensor,
    grad_z: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
) -> Gradients:
    """Gradients of ``forward``; ``saved`` is its result, ``grad`` [B,T,H,V] and grad_kv, grad_z those of its outputs."""
    grads = _empty_gradients(x)
    grad_state = _join_state(grad_kv, grad_z, x)
    B, T, H, _ = x.q.shape
    if causal:
        blocks = list(causal_blocks(T, B * H))
        starts = _states_at_starts(x, blocks)
        for block, state in zip(reversed(blocks), reversed(starts), strict=True):
            incoming = _numerator_gradient(grad, saved, block, x, normalize, eps)
            grad_state = _causal_block_backward(x, block, state, incoming, grad_state, grads)
    else:
        state = _join_state(saved.kv, saved.z, x)
        for block in wide_blocks(T, B * H):
            incoming = _numerator_gradient(grad, saved, block, x, normalize, eps)
            phi_q = _query_features(x, block)
            grad_state = grad_state + (phi_q.transpose(-1, -2) @ incoming)[0]
            _write_feature_gradient(
                incoming @ state.transpose(-1, -2), block, x.q, x.q_factors, grads.q, grads.q_factors
            )
        for block in wide_blocks(x.k.shape[1], B * H):
            w, phi_k = _values(x, block), _key_features(x, block)
            _write_value_gradient(phi_k @ grad_state, block, grads)
            _write_feature_gradient(w @ grad_state.transpose(-1, -2), block, x.k, x.k_factors, grads.k, grads.k_factors)
    if x.key_mask is not None:
        for field in (grads.k, grads.v, grads.k_factors):
            if field is not None:
                field.masked_fill_(~x.key_mask[:, :, None, None], 0)
    if x.kv is None:
        return grads
    kv, z = _split_state(grad_state, x)
    return grads._replace(kv=kv, z=z)


# ---- blocks of tokens ------------------------------------------------------------------------------------------------


def causal_blocks(T: int, heads: int) -> Iterator[Block]:
    """Blocks of whole chunks, then the tail of fewer than CHUNK tokens as a chunk of its own size."""
    chunks = max(1, min(16, BLOCK_TOKENS // (CHUNK * max(heads, 1))))
    start = 0
    while T - start >= CHUNK:
        n = min(chunks, (T - start) // CHUNK)
        yield Block(start, n, CHUNK)
        start += n * CHUNK
    if start < T:
        yield Block(start, 1, T - start)


def wide_blocks(T: int, heads: int) -> Iterator[Block]:
    """Blocks of one chunk each, as long as fits: for attention that sees everything."""
    size = max(CHUNK, BLOCK_TOKENS // max(heads, 1))
    for start in range(0, T, size):
        yield Block(start, 1, min(size, T - start))


def _view(x: Tensor, block: Block, groups: int) -> Tensor:
    """[B, T, heads, D] -> a view [n, B, groups, heads / groups, C, D] of the block (heads 1: both head axes are 1)."""
    part = x[:, block.start : block.start + block.n * block.C]
    heads = part.shape[2]
    groups = min(groups, heads)
    part = part.reshape(part.shape[0], block.n, block.C, groups, heads // groups, part.shape[-1])
    return part.permute(1, 0, 3, 4, 2, 5)


# ---- features and values ---------------------------------------------------------------------------------------------


def _features(x: Tensor, factors: Tensor | None, block: Block, groups: int, dtype: torch.dtype) -> Tensor:
    """phi = factors (x) x as [n, B, G, r C, F], contiguous."""
    tokens = _view(x, block, groups)
    n, B, G, r, C, K = tokens.shape
    if factors is None:
        return tokens.to(dtype).reshape(n, B, G, r * C, K)
    R = factors.shape[-1]
    phi = torch.empty(n, B, G, r, C, R, K, dtype=dtype, device=x.device)
    f = _view(factors, block, groups)
    for rank in range(R):  # three times as fast as one product that broadcasts over both
        torch.mul(tokens, f[..., rank : rank + 1], out=phi[..., rank, :])
    return phi.view(n, B, G, r * C, R * K)


def _query_features(x: Inputs, block: Block) -> Tensor:
    return _features(x.q, x.q_factors, block, x.k.shape[2], x.compute_dtype)


def _key_features(x: Inputs, block: Block) -> Tensor:
    phi = _features(x.k, x.k_factors, block, x.k.shape[2], x.compute_dtype)
    return phi if x.key_mask is None else phi.masked_fill(_hidden(x.key_mask, block), 0)


def _values(x: Inputs, block: Block) -> Tensor:
    """w = [v, 1] as [n, B, G, C, V + 1]."""
    v = _view(x.v, block, x.k.shape[2]).squeeze(3)
    w = torch.ones(*v.shape[:-1], v.shape[-1] + 1, dtype=x.compute_dtype, device=v.device)
    w[..., :-1] = v
    return w if x.key_mask is None else w.masked_fill_(_hidden(x.key_mask, block), 0)


def _hidden(key_mask: Tensor, block: Block) -> Tensor:
    part = key_mask[:, block.start : block.start + block.n * block.C]
    return ~part.reshape(-1, block.n, block.C).transpose(0, 1)[:, :, None, :, None]


# ---- states ----------------------------------------------------------------------------------------------------------


def _join_state(kv: Tensor, z: Tensor, x: Inputs) -> Tensor:
    """kv [B,G,R,K,V], z [B,G,R,K] -> [B, G, F, V + 1]."""
    return torch.cat([kv.flatten(2, 3), z.flatten(2, 3)[..., None]], dim=-1).to(x.compute_dtype)


def _split_state(state: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    state = state.unflatten(2, (x.rank, x.k.shape[-1]))
    return state[..., :-1].clone(memory_format=torch.contiguous_format), state[..., -1].clone(
        memory_format=torch.contiguous_format
    )


def _initial_state(x: Inputs) -> Tensor:
    if x.kv is not None and x.z is not None:
        return _join_state(x.kv, x.z, x)
    G, K, V = x.k.shape[2], x.k.shape[3], x.v.shape[3]
    return torch.zeros(x.k.shape[0], G, x.rank * K, V + 1, dtype=x.compute_dtype, device=x.k.device)


# ---- decay inside a chunk --------------------------------------------------------------------------------------------


class Decay(NamedTuple):
    """since_start e_q and until_end e_k [n, B, G, C, 1], whole e_C [n, B, G, 1, 1], between D [n, B, G, C, C]."""

    since_start: Tensor
    until_end: Tensor
    whole: Tensor
    between: Tensor


def _decay(x: Inputs, block: Block) -> Decay | None:
    if x.log_decay is None:
        return None
    steps = _view(x.log_decay[..., None], block, x.k.shape[2]).squeeze(3).to(x.compute_dtype)
    total = steps.cumsum(-2)
    between = (total - total.transpose(-1, -2)).masked_fill_(~_lower_triangle(block.C, total), -torch.inf).exp_()
    return Decay(total.exp(), (total[..., -1:, :] - total).exp_(), total[..., -1:, :].exp(), between)


def _lower_triangle(C: int, like: Tensor) -> Tensor:
    return torch.ones(C, C, dtype=torch.bool, device=like.device).tril_()


def _apply_causal(P: Tensor, decay: Decay | None, C: int) -> Tensor:
    """P [n, B, G, r C, C] times the decay between query and key, 0 where the key is later; in place."""
    if decay is not None:
        return P.mul_(decay.between)
    P.unflatten(-2, (-1, C)).mul_(_lower_triangle(C, P).to(P.dtype))
    return P


# ---- causal blocks ---------------------------------------------------------------------------------------------------


def _chunk_states(phi_k: Tensor, w: Tensor, state: Tensor, decay: Decay | None) -> Tensor:
    """States before each chunk of the block and after the last: [n + 1, B, G, F, V + 1]."""
    states = _beside(phi_k.transpose(-1, -2), w if decay is None else w * decay.until_end, first=True)
    states[0] = state
    for c in range(states.shape[0] - 1):
        states[c + 1].add_(states[c]) if decay is None else states[c + 1].addcmul_(states[c], decay.whole[c])
    return states


def _causal_block(x: Inputs, block: Block, state: Tensor) -> tuple[Tensor, Tensor]:
    """The block's numerators [n, B, G, r C, V + 1] and the state after it."""
    phi_q, phi_k, w, decay = _query_features(x, block), _key_features(x, block), _values(x, block), _decay(x, block)
    states = _chunk_states(phi_k, w, state, decay)
    P = _apply_causal(phi_q @ phi_k.transpose(-1, -2), decay, block.C)
    numerator = P @ w
    if decay is None:
        _add_product(numerator, phi_q, states[:-1])
    else:
        numerator.addcmul_(phi_q @ states[:-1], decay.since_start)
    return numerator, states[-1]


def _beside(a: Tensor, b: Tensor, *, first: bool) -> Tensor:
    """a @ b [n, B, G, F, W] with one free place before it (``first``) or behind: [n + 1, B, G, F, W]."""
    n, B, G, F, _ = a.shape
    room = torch.empty(n + 1, B, G, F, b.shape[-1], dtype=a.dtype, device=a.device)
    products = (room[1:] if first else room[:-1]).flatten(0, 2)
    torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=products)
    return room


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b for batched matrices, without a temporary; total is contiguous."""
    flat = total.view(-1, *total.shape[-2:])
    torch.baddbmm(flat, a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), out=flat)
    return total


def _states_at_starts(x: Inputs, blocks: list[Block]) -> list[Tensor]:
    """The state before every block, found again by a sweep over the keys."""
    starts = [_initial_state(x)]
    for block in blocks[:-1]:
        starts.append(_chunk_states(_key_features(x, block), _values(x, block), starts[-1], _decay(x, block))[-1])
    return starts[: len(blocks)]


def _causal_block_backward(
    x: Inputs, block: Block, state: Tensor, incoming: Tensor, grad_after: Tensor, grads: Gradients
) -> Tensor:
    """Writes the block's gradients and returns that of the state before it.

    ``incoming`` [n, B, G, r C, V + 1] is the gradient of the numerators, ``grad_after`` [B, G, F, V + 1] that of the
    state after the block.
    """
    phi_q, phi_k, w, decay = _query_features(x, block), _key_features(x, block), _values(x, block), _decay(x, block)
    states = _chunk_states(phi_k, w, state, decay)
    read = incoming if decay is None else incoming * decay.since_start
    grad_states = _grad_chunk_states(phi_q, read, grad_after, decay)
    before, after = states[:-1], grad_states[1:]

    P = _apply_causal(phi_q @ phi_k.transpose(-1, -2), decay, block.C)
    dP = _apply_causal(incoming @ w.transpose(-1, -2), decay, block.C)
    grad_w = P.transpose(-1, -2) @ incoming
    grad_phi_k = dP.transpose(-1, -2) @ phi_q
    grad_phi_q = dP @ phi_k
    _add_product(grad_phi_q, read, before.transpose(-1, -2))
    if decay is None:
        _add_product(grad_w, phi_k, after)
        _add_product(grad_phi_k, w, after.transpose(-1, -2))
    else:
        grad_w.addcmul_(phi_k @ after, decay.until_end)
        _add_product(grad_phi_k, w * decay.until_end, after.transpose(-1, -2))
        # Every term with phi_q(t) carries exp(+total_t), every term with phi_k(t) exp(-total_t), the state after the
        # chunk exp(+total_C): so the gradient of the running total needs no further product.
        total = (phi_q * grad_phi_q).sum(-1) - (phi_k * grad_phi_k).sum(-1)
        total[..., -1] += (states[1:] * after).sum((-1, -2))
        steps = total.flip(-1).cumsum(-1).flip(-1)
        assert grads.log_decay is not None
        _view(grads.log_decay[..., None], block, x.k.shape[2]).squeeze(3).squeeze(-1).copy_(steps)
    _write_value_gradient(grad_w, block, grads)
    _write_feature_gradient(grad_phi_q, block, x.q, x.q_factors, grads.q, grads.q_factors)
    _write_feature_gradient(grad_phi_k, block, x.k, x.k_factors, grads.k, grads.k_factors)
    return grad_states[0]


def _grad_chunk_states(phi_q: Tensor, read: Tensor, grad_after: Tensor, decay: Decay | None) -> Tensor:
    """Gradients of the states before each chunk and after the last: [n + 1, B, G, F, V + 1]."""
    grads = _beside(phi_q.transpose(-1, -2), read, first=False)
    n = grads.shape[0] - 1
    grads[n] = grad_after
    for c in reversed(range(n)):
        grads[c].add_(grads[c + 1]) if decay is None else grads[c].addcmul_(grads[c + 1], decay.whole[c])
    return grads


# ---- outputs and gradients, block by block ---------------------------------------------------------------------------


def _finish(numerator: Tensor, block: Block, result: Forward, normalize: bool, eps: float) -> None:
    """Divide by the clamped normaliser and write output and normaliser of the block."""
    G = numerator.shape[2]
    numerator = numerator.unflatten(-2, (-1, block.C))
    out = _view(result.output, block, G)
    normaliser = numerator[..., -1:]
    _view(result.normaliser[..., None], block, G).copy_(normaliser)
    if normalize:
        torch.div(numerator[..., :-1], normaliser.clamp(min=eps), out=out)
    else:
        out.copy_(numerator[..., :-1])


def _numerator_gradient(grad: Tensor, saved: Forward, block: Block, x: Inputs, normalize: bool, eps: float) -> Tensor:
    """Gradient of [numerator, normaliser] as [n, B, G, r C, V + 1]; a clamped normaliser gets none."""
    G = x.k.shape[2]
    g = _view(grad, block, G)
    both = torch.zeros(*g.shape[:-1], g.shape[-1] + 1, dtype=x.compute_dtype, device=g.device)
    if normalize:
        normaliser = _view(saved.normaliser[..., None], block, G)
        torch.div(g, normaliser.clamp(min=eps), out=both[..., :-1])
        dot = (both[..., :-1] * _view(saved.output, block, G)).sum(-1, keepdim=True)
        torch.mul(dot, (normaliser >= eps).to(dot.dtype).neg_(), out=both[..., -1:])
    else:
        both[..., :-1] = g
    return both.flatten(3, 4)


def _write_value_gradient(grad_w: Tensor, block: Block, grads: Gradients) -> None:
    _view(grads.v, block, grads.v.shape[2]).squeeze(3).copy_(grad_w[..., :-1])


def _write_feature_gradient(
    grad_phi: Tensor, block: Block, x: Tensor, factors: Tensor | None, grad_x: Tensor, grad_factors: Tensor | None
) -> None:
    """From the gradient of phi [n, B, G, r C, F] to those of x (sum over the rank) and of its factors (over the width)."""
    G = grad_phi.shape[2]
    grad_phi = grad_phi.unflatten(-2, (-1, block.C))
    target = _view(grad_x, block, G)
    if factors is None or grad_factors is None:
        target.copy_(grad_phi)
        return
    R, K = factors.shape[-1], x.shape[-1]
    grad_phi = grad_phi.unflatten(-1, (R, K))
    tokens, f = _view(x, block, G), _view(factors, block, G)
    same = target.dtype == grad_phi.dtype
    total = torch.mul(grad_phi[..., 0, :], f[..., :1], out=target if same else None)
    for r in range(1, R):
        total.addcmul_(grad_phi[..., r, :], f[..., r : r + 1].to(total.dtype))
    if not same:
        target.copy_(total)
    by_factor = torch.stack([(grad_phi[..., r, :] * tokens).sum(-1) for r in range(R)], dim=-1)
    if factors.shape[2] == 1:
        by_factor = by_factor.sum((2, 3), keepdim=True)
    _view(grad_factors, block, G).copy_(by_factor)


def _empty_gradients(x: Inputs) -> Gradients:
    def empty(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    q, k, v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v))
    return Gradients(q, k, v, empty(x.q_factors), empty(x.k_factors), empty(x.log_decay), None, None)
