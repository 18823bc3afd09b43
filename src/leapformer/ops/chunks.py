"""Linear attention in linear time and memory with batched matrix products: the dense core and its gradient.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, r = H/G, R rank, K key width, F = R K feature
width, V value width, C tokens of a chunk, n chunks of a block, m = n B G matrices of a block, chunk by chunk.

Attention goes block by block, so that temporaries stay in cache; a block is some chunks of some heads of some samples,
and within it B and G count those. Causal attention in a chunk:

    P = (phi_q phi_k^T) * D          num = P v + e_q (phi_q S)          S' = e_C S + phi_k^T (e_k v)
                                     den = P 1 + e_q (phi_q z)          z' = e_C z + phi_k^T e_k

with D the causal mask (times the decay between two tokens of a chunk), e_q the decay since the chunk began, e_k the
decay up to its end, e_C that of the whole chunk. D, e_q, e_k and e_C never exceed 1. The normaliser could be one more
channel of the values, but products 65 wide take a quarter longer than those 64 wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leapformer.ops.arguments import Arguments, Gradients, Incoming
from leapformer.ops.blocking import Block, causal_blocks, rows_of, view, wide_blocks
from leapformer.ops.buffers import Room, State, Workspace
from leapformer.ops.decay import running_sum
from leapformer.ops.memory import new_empty


class Result(NamedTuple):
    """output [B,T,H,V] in the input dtype; at least float32: kv, z the final state, normaliser [B,T,H] unclamped,
    [B,0,H] where nothing is normalised."""

    output: Tensor
    kv: Tensor
    z: Tensor
    normaliser: Tensor


def forward(x: Arguments) -> Result:
    """Attention where every query sees all keys, or (``causal``, T = S) those up to its own slot."""
    assert x.counts is None and x.cu_seqlens is None, "what is laid out otherwise is for layouts.py"
    assert not x.causal or x.q.shape[1] == x.k.shape[1], (
        "a causal block is a view of queries and of keys by the same slots"
    )
    result, rooms = _empty_result(x), Workspace(x)
    for rows in rows_of(x):
        state = _state(x, rows, x.kv, x.z)
        if x.causal:
            for block in causal_blocks(rows, x.q.shape[1]):
                _causal_block(x, block, state, result, rooms[block])
        else:
            for block in wide_blocks(rows, x.k.shape[1]):
                _absorb(x, block, state, rooms[block])
            for block in wide_blocks(rows, x.q.shape[1]):
                _read(x, block, state, result, rooms[block])
        _store(state, rows, result.kv, result.z)
    return result


def backward(x: Arguments, saved: Result, incoming: Incoming) -> Gradients:
    """Gradients of ``forward``, whose result is ``saved``; those of factors are in the compute dtype."""
    grads, rooms, with_z = _empty_gradients(x), Workspace(x), x.normalize or incoming.z is not None
    quotient = _quotient(x, saved, incoming.output)
    for rows in rows_of(x):
        grad_state = _state(x, rows, incoming.kv, incoming.z, with_z)
        if x.causal:
            blocks = list(causal_blocks(rows, x.q.shape[1]))
            starts = _block_starts(x, rows, blocks, with_z, rooms)
            for block, start in zip(reversed(blocks), reversed(starts), strict=True):
                _causal_block_backward(x, block, start, quotient, grad_state, grads, rooms[block])
        else:
            state = _state(x, rows, saved.kv, saved.z)
            for block in wide_blocks(rows, x.q.shape[1]):
                _read_backward(x, block, state, quotient, grad_state, grads, rooms[block])
            for block in wide_blocks(rows, x.k.shape[1]):
                _absorb_backward(x, block, grad_state, grads, rooms[block])
        if grads.kv is not None and grads.z is not None:
            _store(grad_state, rows, grads.kv, grads.z)
    if x.key_mask is not None:
        for field in (grads.k, grads.v, grads.k_factors):
            if field is not None:
                field.masked_fill_(~x.key_mask[:, :, None, None], 0)
    return grads


# ---- features, values, states ----------------------------------------------------------------------------------------


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


def _query_features(x: Arguments, block: Block, room: Room) -> Tensor:
    return _features(x.q, x.q_factors, block, x.k.shape[2], room.phi_q, room.relu_q if x.relu else None)


def _keys_and_values(x: Arguments, block: Block, room: Room) -> tuple[Tensor, Tensor]:
    """phi_k [m, C, F] and v [m, C, V], zero where masked."""
    G = x.k.shape[2]
    phi = _features(x.k, x.k_factors, block, G, room.phi_k, room.relu_k if x.relu else None)
    v = _features(x.v, None, block, G, room.v)
    if x.key_mask is not None:
        hidden = ~view(x.key_mask[..., None], block, G).squeeze(3)
        for keys in (phi, v):
            keys.view(block.n, block.B, block.G, *keys.shape[1:]).masked_fill_(hidden, 0)
    return phi, v


def _state(x: Arguments, rows: Block, kv: Tensor | None, z: Tensor | None, with_z: bool = True) -> State:
    """A state of its own with the rows' values of kv [B,G,R,K,V] and z [B,G,R,K]; zeros for None."""
    shape = (rows.B * rows.G, x.rank * x.k.shape[3], x.v.shape[3])
    state = State(
        x.q.new_zeros(shape, dtype=x.compute_dtype),
        x.q.new_zeros(shape[0], 1, shape[1], dtype=x.compute_dtype) if with_z else None,
    )
    for field, values in zip(state, (kv, z), strict=True):
        if field is not None and values is not None:
            part = values[rows.states]
            field.view(part.shape).copy_(part)
    return state


def _store(state: State, rows: Block, kv: Tensor, z: Tensor) -> None:
    for field, target in zip(state, (kv, z), strict=True):
        part = target[rows.states]
        part.zero_() if field is None else part.copy_(field.view(part.shape))


# ---- decay inside a chunk --------------------------------------------------------------------------------------------


class Decay(NamedTuple):
    """since_start e_q and until_end e_k [m, C, 1], whole e_C n times [B G, 1, 1], between D [m, C, C]."""

    since_start: Tensor
    until_end: Tensor
    whole: Sequence[Tensor]
    between: Tensor


def _decay(x: Arguments, block: Block, room: Room) -> Decay | None:
    if x.log_decay is None:
        return None
    steps = view(x.log_decay, block, x.k.shape[2]).reshape(-1, block.C, 1)
    total = running_sum(steps, -2, x.compute_dtype)
    # Between a key and an earlier query the difference is positive; what it becomes is cut off.
    between = room.between.copy_(total - total.transpose(-1, -2)).exp_().tril_()
    end = total[:, -1:]
    since_start, until_end = (part.to(x.compute_dtype).exp_() for part in (total, end - total))
    return Decay(since_start, until_end, since_start[:, -1:].unflatten(0, (block.n, -1)).unbind(), between)


def _apply_causal(P: Tensor, decay: Decay | None) -> Tensor:
    """P [m, r C, C] times the decay between query and key, 0 where the key is later; in place."""
    if decay is not None:
        return P.mul_(decay.between)
    P.view(-1, P.shape[-1], P.shape[-1]).tril_()
    return P


# ---- attention that sees everything ----------------------------------------------------------------------------------


def _absorb(x: Arguments, block: Block, state: State, room: Room) -> None:
    phi_k, v = _keys_and_values(x, block, room)
    state.kv.baddbmm_(room.phi_k_T, v)
    if state.z is not None:
        state.z.add_(phi_k.sum(-2, keepdim=True))


def _read(x: Arguments, block: Block, state: State, result: Result, room: Room) -> None:
    phi_q = _query_features(x, block, room)
    torch.bmm(phi_q, state.kv, out=room.out)
    normaliser = _read_normaliser(state, room) if result.normaliser.shape[1] else None
    _finish(room.out, normaliser, block, x, result)


def _read_normaliser(state: State, room: Room) -> Tensor:
    """phi_q . z as [m, r C, 1]; this way round it is seven times as fast as a product with a column."""
    assert state.z is not None
    return torch.bmm(state.z, room.phi_q_T).transpose(-1, -2)


def _read_backward(
    x: Arguments, block: Block, state: State, quotient: Quotient, grad_state: State, grads: Gradients, room: Room
) -> None:
    phi_q = _query_features(x, block, room)
    g, g_z = _numerator_gradient(quotient, block, x, grad_state.z is not None, room)
    torch.bmm(g, state.kv.transpose(-1, -2), out=room.grad_phi_q)
    grad_state.kv.baddbmm_(room.phi_q_T, g)
    if g_z is not None and grad_state.z is not None and state.z is not None:
        room.grad_phi_q.addcmul_(g_z, state.z)
        grad_state.z.baddbmm_(g_z.transpose(-1, -2), phi_q)
    _write_query_gradient(x, block, grads, room)


def _absorb_backward(x: Arguments, block: Block, grad_state: State, grads: Gradients, room: Room) -> None:
    phi_k, v = _keys_and_values(x, block, room)
    torch.bmm(phi_k, grad_state.kv, out=room.grad_v)
    torch.bmm(v, grad_state.kv.transpose(-1, -2), out=room.grad_phi_k)
    if grad_state.z is not None:
        room.grad_phi_k.add_(grad_state.z)
    _write_key_gradient(x, block, grads, room)


# ---- causal attention ------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """What the keys of a block bring: phi [m, C, F], v [m, C, V], and to the state at the end of their chunk the
    weights e_k, or 1, [m, C, 1] and e_k v."""

    phi: Tensor
    v: Tensor
    weights: Tensor
    weighted_v: Tensor


def _keys(x: Arguments, block: Block, decay: Decay | None, state: State, room: Room) -> Keys:
    """The keys, and in ``room.states`` the states that they make from ``state`` on, which moves to the block's end."""
    phi, v = _keys_and_values(x, block, room)
    if decay is None:
        keys = Keys(phi, v, room.ones, v)
    else:
        keys = Keys(phi, v, decay.until_end, torch.mul(v, decay.until_end, out=room.weighted_v))
    after = room.states.after
    torch.bmm(room.phi_k_T, keys.weighted_v, out=after.kv)
    if state.z is not None:
        torch.bmm(keys.weights.transpose(-1, -2), phi, out=after.z)
    room.states.run(state, None if decay is None else decay.whole)
    return keys


def _scores(a: Tensor, b_T: Tensor, decay: Decay | None, room: Room, bias: Tensor | None = None) -> Tensor:
    """(a b^T + bias) * D as [m, r C, C]; bias [m, r C, 1]."""
    if bias is None:
        torch.bmm(a, b_T, out=room.scores)
    else:
        torch.baddbmm(bias.expand(room.scores.shape), a, b_T, out=room.scores)
    return _apply_causal(room.scores, decay)


def _add_product(total: Tensor, a: Tensor, b: Tensor, weights: Tensor | None) -> None:
    """total += weights * (a b), weights [m, C, 1]; in place."""
    if weights is None:
        total.baddbmm_(a, b)
    else:
        total.addcmul_(torch.bmm(a, b), weights)


def _causal_block(x: Arguments, block: Block, state: State, result: Result, room: Room) -> None:
    """Writes the block's results and moves ``state`` to its end."""
    decay = _decay(x, block, room)
    phi_q, keys = _query_features(x, block, room), _keys(x, block, decay, state, room)
    since_start = None if decay is None else decay.since_start
    before = room.states.before
    P = _scores(phi_q, room.phi_k_T, decay, room)
    numerator = torch.bmm(P, keys.v, out=room.out)
    _add_product(numerator, phi_q, before.kv, since_start)
    normaliser = None
    if result.normaliser.shape[1]:
        old = _read_normaliser(before, room)
        normaliser = P.sum(-1, keepdim=True).add_(old if since_start is None else old.mul_(since_start))
    _finish(numerator, normaliser, block, x, result)


def _block_starts(x: Arguments, rows: Block, blocks: list[Block], with_z: bool, rooms: Workspace) -> list[State]:
    """The state before every block, found again by a sweep over the keys."""
    state, starts = _state(x, rows, x.kv, x.z, with_z), []
    for i, block in enumerate(blocks):
        starts.append(State(state.kv.clone(), None if state.z is None else state.z.clone()))
        if i < len(blocks) - 1:
            _keys(x, block, _decay(x, block, rooms[block]), state, rooms[block])
    return starts


def _causal_block_backward(
    x: Arguments, block: Block, state: State, quotient: Quotient, grad_state: State, grads: Gradients, room: Room
) -> None:
    """Writes the block's gradients and moves ``grad_state``, that of the state after the block, to that before it;
    ``state`` is the state before the block."""
    decay = _decay(x, block, room)
    phi_q, keys = _query_features(x, block, room), _keys(x, block, decay, state, room)
    g, g_z = _numerator_gradient(quotient, block, x, grad_state.z is not None, room)
    read, read_z, until_end = g, g_z, None
    if decay is not None:
        until_end = decay.until_end
        read = torch.mul(g, decay.since_start, out=room.read)
        read_z = None if g_z is None else g_z * decay.since_start
    states, grad_states = room.states, room.grad_states
    torch.bmm(room.phi_q_T, read, out=grad_states.before.kv)
    if read_z is not None:
        torch.bmm(read_z.transpose(-1, -2), phi_q, out=grad_states.before.z)
    grad_states.run(grad_state, None if decay is None else decay.whole, backwards=True)

    _scores(phi_q, room.phi_k_T, decay, room)
    torch.bmm(room.scores_T, g, out=room.grad_v)
    _add_product(room.grad_v, keys.phi, grad_states.after.kv, until_end)
    dP = _scores(g, room.v_T, decay, room, bias=g_z)
    grad_phi_q = torch.bmm(dP, keys.phi, out=room.grad_phi_q).baddbmm_(read, states.before_T)
    grad_phi_k = torch.bmm(room.scores_T, phi_q, out=room.grad_phi_k).baddbmm_(keys.weighted_v, grad_states.after_T)
    if read_z is not None:
        assert states.before.z is not None and grad_states.after.z is not None
        grad_phi_q.addcmul_(read_z, states.before.z)
        grad_phi_k.addcmul_(keys.weights, grad_states.after.z)
    if grads.log_decay is not None:
        steps = _decay_gradient(room, read_z is not None)
        target = view(grads.log_decay, block, x.k.shape[2])
        target.copy_(steps.view(target.shape))
    _write_query_gradient(x, block, grads, room)
    _write_key_gradient(x, block, grads, room)


def _decay_gradient(room: Room, with_z: bool) -> Tensor:
    """[m, C], from features and states, which it overwrites, and their gradients.

    Every term with phi_q(t) carries exp(+total_t), every term with phi_k(t) exp(-total_t), the state after the chunk
    exp(+total_C): so the gradient of the running total needs no further product.
    """
    total = room.phi_q.mul_(room.grad_phi_q).sum(-1).sub_(room.phi_k.mul_(room.grad_phi_k).sum(-1))
    after, grad_after = room.states.after, room.grad_states.after
    for field, grad in zip(after[: 1 + with_z], grad_after, strict=False):
        assert field is not None and grad is not None
        total[:, -1] += field.mul_(grad).sum((-1, -2))
    return total.flip(-1).cumsum(-1).flip(-1)


# ---- outputs and gradients, block by block ---------------------------------------------------------------------------


def _finish(numerator: Tensor, normaliser: Tensor | None, block: Block, x: Arguments, result: Result) -> None:
    """Divide by the clamped normaliser [m, r C, 1], if there is one, and write output and normaliser of the block."""
    out = view(result.output, block, x.k.shape[2])
    if normaliser is None:
        out.copy_(numerator.view(out.shape))
        return
    kept = view(result.normaliser, block, x.k.shape[2])
    kept.copy_(normaliser.view(kept.shape))
    torch.div(numerator.view(out.shape), kept.clamp(min=x.eps), out=out)


class Quotient(NamedTuple):
    """The gradient of the output [B,T,H,V]; where it was normalised also the output, 1 / clamped normaliser and, to be
    multiplied with, -1 where it was not clamped and 0 where it was [B,T,H]."""

    grad: Tensor
    output: Tensor
    scale: Tensor | None
    passes: Tensor | None


def _quotient(x: Arguments, saved: Result, grad: Tensor) -> Quotient:
    if not x.normalize:
        return Quotient(grad, saved.output, None, None)
    passes = (saved.normaliser >= x.eps).to(saved.normaliser.dtype).neg_()
    return Quotient(grad, saved.output, saved.normaliser.clamp(min=x.eps).reciprocal_(), passes)


def _numerator_gradient(
    quotient: Quotient, block: Block, x: Arguments, with_z: bool, room: Room
) -> tuple[Tensor, Tensor | None]:
    """Gradients of numerators [m, r C, V] and normalisers [m, r C, 1]; a clamped normaliser gets none."""
    G = x.k.shape[2]
    grad, g = view(quotient.grad, block, G), room.g
    by_head = g.view(grad.shape)
    if quotient.scale is None or quotient.passes is None:
        by_head.copy_(grad)
        return g, g.new_zeros(*g.shape[:2], 1) if with_z else None
    torch.mul(grad, view(quotient.scale, block, G), out=by_head)
    product = torch.mul(by_head, view(quotient.output, block, G), out=room.out.view(grad.shape))
    dot = product.sum(-1, keepdim=True).mul_(view(quotient.passes, block, G))
    return g, dot.view(*g.shape[:2], 1)


def _write_query_gradient(x: Arguments, block: Block, grads: Gradients, room: Room) -> None:
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


def _write_key_gradient(x: Arguments, block: Block, grads: Gradients, room: Room) -> None:
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


def _empty_result(x: Arguments) -> Result:
    (B, T, H, K), G, V, dtype = x.q.shape, x.k.shape[2], x.v.shape[3], x.compute_dtype
    return Result(
        new_empty(x.q, (B, T, H, V)),
        x.q.new_empty(B, G, x.rank, K, V, dtype=dtype),
        x.q.new_empty(B, G, x.rank, K, dtype=dtype),
        x.q.new_empty(B, T if x.normalize else 0, H, dtype=dtype),
    )


def _empty_gradients(x: Arguments) -> Gradients:
    """Empty, but zeros for factors, to which every head adds."""

    def empty(field: Tensor | None) -> Tensor | None:
        return None if field is None else new_empty(field, field.shape)

    def zeros(factors: Tensor | None) -> Tensor | None:
        return None if factors is None else factors.new_zeros(factors.shape, dtype=x.compute_dtype)

    q, k, v = (new_empty(field, field.shape) for field in x[:3])
    return Gradients(
        q, k, v, zeros(x.q_factors), zeros(x.k_factors), log_decay=empty(x.log_decay), kv=empty(x.kv), z=empty(x.z)
    )
