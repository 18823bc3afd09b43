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

With a ``later_decay`` later keys are seen too. Then D has no zeros: its other triangle holds the later decay between a
query and a later key. And a second state L, of the keys behind the chunk, goes from the end to the start:

    num = P v + e_q (phi_q S) + l_q (phi_q L)          L' = l_C L + phi_k^T (l_k v)

with l_q the later decay up to the chunk's end, l_k that since it began, l_C that of the whole chunk. What comes from
the end is first found at the ends of all blocks, and kept; then one sweep has both. For gradients that sweep goes from
the end, as it does for causal attention: kept are S and the gradient of L, which both come from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leapformer.ops.arguments import Arguments, Gradients, Incoming
from leapformer.ops.blocking import Block, causal_blocks, rows_of, view, wide_blocks
from leapformer.ops.buffers import Direction, Room, State, Workspace
from leapformer.ops.chunk_decay import Decay, Fade, chunk_decay, later_gradient, past_gradient
from leapformer.ops.features import keys_and_values, query_features, write_key_gradient, write_query_gradient
from leapformer.ops.memory import new_empty


class Result(NamedTuple):
    """output [B,T,H,V] in the input dtype; at least float32: kv, z the final state, normaliser [B,T,H] unclamped,
    [B,0,H] where nothing is normalised."""

    output: Tensor
    kv: Tensor
    z: Tensor
    normaliser: Tensor


def forward(x: Arguments) -> Result:
    """Attention where every query sees all keys, or (``causal``, T = S) those up to its own slot, with a
    ``later_decay`` those behind it too."""
    assert x.counts is None and x.cu_seqlens is None, "what is laid out otherwise is for layouts.py"
    assert not x.causal or x.q.shape[1] == x.k.shape[1], (
        "a causal block is a view of queries and of keys by the same slots"
    )
    result, rooms = _empty_result(x), Workspace(x)
    for rows in rows_of(x):
        state = _state(x, rows, x.kv, x.z)
        if x.causal:
            blocks = list(causal_blocks(rows, x.q.shape[1]))
            ends = [None] * len(blocks) if x.later_decay is None else _later_states(x, rows, blocks, rooms)
            for block, later in zip(blocks, ends, strict=True):
                _causal_block(x, block, state, later, result, rooms[block])
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
            starts = _past_states(x, rows, blocks, with_z, rooms)
            later = None
            if x.later_decay is not None:
                later = _later_gradients(x, rows, blocks, quotient, with_z, rooms)
            for i in reversed(range(len(blocks))):
                past = Carried(starts[i], grad_state)
                behind = None if later is None else Carried(later.state, later.gradients[i])
                _causal_block_backward(x, blocks[i], past, behind, quotient, grads, rooms[blocks[i]])
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


# ---- attention that sees everything ----------------------------------------------------------------------------------


def _absorb(x: Arguments, block: Block, state: State, room: Room) -> None:
    phi_k, v = keys_and_values(x, block, room)
    state.kv.baddbmm_(room.phi_k_T, v)
    if state.z is not None:
        state.z.add_(phi_k.sum(-2, keepdim=True))


def _read(x: Arguments, block: Block, state: State, result: Result, room: Room) -> None:
    phi_q = query_features(x, block, room)
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
    phi_q = query_features(x, block, room)
    g, g_z = _numerator_gradient(quotient, block, x, grad_state.z is not None, room)
    torch.bmm(g, state.kv.transpose(-1, -2), out=room.grad_phi_q)
    grad_state.kv.baddbmm_(room.phi_q_T, g)
    if g_z is not None and grad_state.z is not None and state.z is not None:
        room.grad_phi_q.addcmul_(g_z, state.z)
        grad_state.z.baddbmm_(g_z.transpose(-1, -2), phi_q)
    write_query_gradient(x, block, grads, room)


def _absorb_backward(x: Arguments, block: Block, grad_state: State, grads: Gradients, room: Room) -> None:
    phi_k, v = keys_and_values(x, block, room)
    torch.bmm(phi_k, grad_state.kv, out=room.grad_v)
    torch.bmm(v, grad_state.kv.transpose(-1, -2), out=room.grad_phi_k)
    if grad_state.z is not None:
        room.grad_phi_k.add_(grad_state.z)
    write_key_gradient(x, block, grads, room)


# ---- causal attention ------------------------------------------------------------------------------------------------


class Weighted(NamedTuple):
    """Tokens as a state meets them: of keys e_k v and e_k (or 1), of the gradients of what queries read e_q g and e_q
    g_z, None where nothing is normalised. values [m, r C, V], weights [m, r C, 1]."""

    values: Tensor
    weights: Tensor | None


def _absorb_keys(phi: Tensor, v: Tensor, carry: State, direction: Direction, fade: Fade | None, room: Room) -> Weighted:
    """The keys as the states on the other side of their chunk get them; ``direction.states`` are then those that they
    make from ``carry`` on, which moves over the block."""
    written = direction.states.written
    weights = room.ones if fade is None else fade.write
    values = v if fade is None else torch.mul(v, fade.write, out=direction.weighted_v)
    torch.bmm(room.phi_k_T, values, out=written.kv)
    if carry.z is not None:
        torch.bmm(weights.transpose(-1, -2), phi, out=written.z)
    direction.states.run(carry, None if fade is None else fade.whole)
    return Weighted(values, weights)


def _absorb_gradients(
    phi_q: Tensor, g: Tensor, g_z: Tensor | None, carry: State, direction: Direction, fade: Fade | None, room: Room
) -> Weighted:
    """The gradients of what queries read, as the states get them; ``direction.grad_states`` are then those that they
    make from ``carry`` on, which moves over the block."""
    read = direction.grad_states.read
    weights = g_z if fade is None or g_z is None else g_z * fade.read
    values = g if fade is None else torch.mul(g, fade.read, out=direction.weighted_g)
    torch.bmm(room.phi_q_T, values, out=read.kv)
    if weights is not None:
        torch.bmm(weights.transpose(-1, -2), phi_q, out=read.z)
    direction.grad_states.run(carry, None if fade is None else fade.whole, gradients=True)
    return Weighted(values, weights)


def _products(a: Tensor, b_T: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias as ``out`` [m, r C, C]; bias [m, r C, 1]."""
    if bias is None:
        return torch.bmm(a, b_T, out=out)
    return torch.baddbmm(bias.expand(out.shape), a, b_T, out=out)


def _apply_between(P: Tensor, between: Tensor | None) -> Tensor:
    """P [m, r C, C] times the decay between query and key, or 0 where the key is later; in place."""
    if between is not None:
        return P.mul_(between)
    P.view(-1, P.shape[-1], P.shape[-1]).tril_()
    return P


def _add_product(total: Tensor, a: Tensor, b: Tensor, weights: Tensor | None) -> None:
    """total += weights * (a b), weights [m, C, 1]; in place."""
    if weights is None:
        total.baddbmm_(a, b)
    else:
        total.addcmul_(torch.bmm(a, b), weights)


def _causal_block(x: Arguments, block: Block, past: State, later: State | None, result: Result, room: Room) -> None:
    """Writes the block's results and moves ``past``, the state before it, to its end; ``later`` is the state behind
    it, of later keys, where these are seen."""
    decay = chunk_decay(x, block)
    phi_q, (phi_k, v) = query_features(x, block, room), keys_and_values(x, block, room)
    P = _products(phi_q, room.phi_k_T, room.scores)
    _apply_between(P, None if decay is None else decay.between(room))
    numerator = torch.bmm(P, v, out=room.out)
    normaliser = P.sum(-1, keepdim=True) if result.normaliser.shape[1] else None
    for carry, direction, fade in _directions(decay, past, later, room):
        _absorb_keys(phi_k, v, carry, direction, fade, room)
        read = None if fade is None else fade.read
        _add_product(numerator, phi_q, direction.states.read.kv, read)
        if normaliser is not None:
            old = _read_normaliser(direction.states.read, room)
            normaliser.add_(old if read is None else old.mul_(read))
    _finish(numerator, normaliser, block, x, result)


def _directions(
    decay: Decay | None, past: State, later: State | None, room: Room
) -> list[tuple[State, Direction, Fade | None]]:
    if later is None or decay is None:
        return [(past, room.past, None if decay is None else decay.past)]
    return [(past, room.past, decay.past), (later, room.later, decay.later)]


def _boundary_states(blocks: Sequence[Block], carry: State, move: Callable[[Block], object]) -> list[State]:
    """``carry`` as it reaches each of the blocks, over which ``move`` takes it one after the other."""
    states = []
    for i, block in enumerate(blocks):
        states.append(State(carry.kv.clone(), None if carry.z is None else carry.z.clone()))
        if i < len(blocks) - 1:
            move(block)
    return states


def _past_states(x: Arguments, rows: Block, blocks: list[Block], with_z: bool, rooms: Workspace) -> list[State]:
    """The state before every block, found again by a sweep over the keys."""
    state = _state(x, rows, x.kv, x.z, with_z)

    def move(block: Block) -> None:
        decay, room = chunk_decay(x, block), rooms[block]
        fade = None if decay is None else decay.past
        _absorb_keys(*keys_and_values(x, block, room), state, room.past, fade, room)

    return _boundary_states(blocks, state, move)


def _later_states(x: Arguments, rows: Block, blocks: list[Block], rooms: Workspace) -> list[State]:
    """The state of later keys behind every block, found by a sweep from the end."""
    state = _state(x, rows, None, None, x.normalize)

    def move(block: Block) -> None:
        decay, room = chunk_decay(x, block), rooms[block]
        assert decay is not None
        _absorb_keys(*keys_and_values(x, block, room), state, room.later, decay.later, room)

    return _boundary_states(blocks[::-1], state, move)[::-1]


class Later(NamedTuple):
    """While gradients go from the last block to the first: the state of later keys behind the block, and its gradient
    before each of the blocks, from those of earlier queries."""

    state: State
    gradients: list[State]


def _later_gradients(
    x: Arguments, rows: Block, blocks: list[Block], quotient: Quotient, with_z: bool, rooms: Workspace
) -> Later:
    carry = _state(x, rows, None, None, with_z)

    def move(block: Block) -> None:
        decay, room = chunk_decay(x, block), rooms[block]
        assert decay is not None
        g, g_z = _numerator_gradient(quotient, block, x, with_z, room)
        _absorb_gradients(query_features(x, block, room), g, g_z, carry, room.later, decay.later, room)

    return Later(_state(x, rows, None, None, with_z), _boundary_states(blocks, carry, move))


class Carried(NamedTuple):
    """A state as it reaches a block, and its gradient, which comes from the other side; both move over the block."""

    state: State
    gradient: State


def _causal_block_backward(
    x: Arguments, block: Block, past: Carried, later: Carried | None, quotient: Quotient, grads: Gradients, room: Room
) -> None:
    """Writes the block's gradients, and moves what it is given to the block's other side."""
    decay = chunk_decay(x, block)
    between = None if decay is None else decay.between(room)
    phi_q, (phi_k, v) = query_features(x, block, room), keys_and_values(x, block, room)
    g, g_z = _numerator_gradient(quotient, block, x, past.gradient.z is not None, room)

    P = _apply_between(_products(phi_q, room.phi_k_T, room.scores), between)
    torch.bmm(P.transpose(-1, -2), g, out=room.grad_v)
    dP = _products(g, room.v_T, room.scores if later is None else room.grad_scores, bias=g_z)
    of_later = None if later is None else _of_later_keys(P, dP)
    _apply_between(dP, between)
    torch.bmm(dP, phi_k, out=room.grad_phi_q)
    torch.bmm(dP.transpose(-1, -2), phi_q, out=room.grad_phi_k)

    fade = None if decay is None else decay.past
    keys = _absorb_keys(phi_k, v, past.state, room.past, fade, room)
    reads = _absorb_gradients(phi_q, g, g_z, past.gradient, room.past, fade, room)
    states, grad_states = room.past.states, room.past.grad_states
    _add_product(room.grad_v, phi_k, grad_states.written.kv, None if fade is None else fade.write)
    _add_through(room.grad_phi_q, reads, states.read_T, states.read.z if g_z is not None else None)
    _add_through(room.grad_phi_k, keys, grad_states.written_T, grad_states.written.z if g_z is not None else None)
    if later is not None and decay is not None and decay.later is not None and of_later is not None:
        keys = _absorb_keys(phi_k, v, later.state, room.later, decay.later, room)
        reads = _absorb_gradients(phi_q, g, g_z, later.gradient, room.later, decay.later, room)
        states, grad_states = room.later.states, room.later.grad_states
        _add_product(room.grad_v, phi_k, grad_states.written.kv, decay.later.write)
        z, grad_z = (s.z if g_z is not None else None for s in (states.read, grad_states.written))
        of_later.sub_(_add_through_of(phi_q, room.grad_phi_q, reads, states.read_T, z, room))
        of_later.add_(_add_through_of(phi_k, room.grad_phi_k, keys, grad_states.written_T, grad_z, room))
    _write_decay_gradients(x, block, of_later, g_z is not None, grads, room)
    write_query_gradient(x, block, grads, room)
    write_key_gradient(x, block, grads, room)


def _add_through(total: Tensor, tokens: Weighted, kv_T: Tensor, z: Tensor | None) -> None:
    """total [m, r C, F] += values kv^T + weights z; in place."""
    total.baddbmm_(tokens.values, kv_T)
    if tokens.weights is not None and z is not None:
        total.addcmul_(tokens.weights, z)


def _add_through_of(phi: Tensor, total: Tensor, tokens: Weighted, kv_T: Tensor, z: Tensor | None, room: Room) -> Tensor:
    """The same; and phi . what was added, [m, C]."""
    part = torch.bmm(tokens.values, kv_T, out=room.from_state)
    if tokens.weights is not None and z is not None:
        part.addcmul_(tokens.weights, z)
    total.add_(part)
    return part.mul_(phi).sum(-1)


def _of_later_keys(P: Tensor, dP: Tensor) -> Tensor:
    """[m, C], of the weights of later keys in a chunk and their gradients: each one's as a key less that as a query.
    Overwrites P."""
    both = P.mul_(dP).triu_(1)
    return both.sum(-2).sub_(both.sum(-1))


def _write_decay_gradients(
    x: Arguments, block: Block, of_later: Tensor | None, with_z: bool, grads: Gradients, room: Room
) -> None:
    """From features and states, which it overwrites, and their gradients; of_later [m, C]: the gradients of the running
    sums of ``later_decay``, of which a query's terms carry exp(-before_t), a key's exp(+before_t).

    Every other term with phi_q(t) carries exp(+total_t), with phi_k(t) exp(-total_t): so the gradient of the running
    total needs no further product.
    """
    if grads.log_decay is None:
        return
    total = room.phi_q.mul_(room.grad_phi_q).sum(-1).sub_(room.phi_k.mul_(room.grad_phi_k).sum(-1))
    steps = [(grads.log_decay, room.past, past_gradient, total)]
    if of_later is not None and grads.later_decay is not None:
        total.add_(of_later)
        steps.append((grads.later_decay, room.later, later_gradient, of_later))
    for field, direction, gradient, sums in steps:
        target = view(field, block, x.k.shape[2])
        target.copy_(gradient(sums, direction.states, direction.grad_states, with_z).view(target.shape))


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
        q,
        k,
        v,
        zeros(x.q_factors),
        zeros(x.k_factors),
        log_decay=empty(x.log_decay),
        later_decay=empty(x.later_decay),
        kv=empty(x.kv),
        z=empty(x.z),
    )
