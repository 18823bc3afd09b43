"""Decay inside a chunk: what is left between its tokens, and between each of them and the chunk's ends.

Letters: n chunks of a block of B samples and G heads, C tokens of a chunk, F feature width, V value width, m = n B G
matrices, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leapformer.ops.arguments import Arguments
from leapformer.ops.blocking import Block, view
from leapformer.ops.buffers import Boundaries, Room, State
from leapformer.ops.decay import running_sum


class Fade(NamedTuple):
    """Between a chunk's tokens and the states of one direction.

    ``read`` [m, C, 1] is what is left of the state that the chunk reads at each query, ``write`` [m, C, 1] what is left
    of each key in the state on the chunk's other side, ``whole``, n times [B G, 1, 1], what is left there of the first.
    """

    read: Tensor
    write: Tensor
    whole: Sequence[Tensor]


class Decay(NamedTuple):
    """``past``: of the state before each chunk; ``later``: of that behind it, where later keys are seen.

    Built of running sums in float64: ``total``, with the own step, of the decay towards later queries, and ``before``,
    without it, of that towards earlier ones.
    """

    past: Fade
    later: Fade | None
    total: Tensor
    before: Tensor | None

    def between(self, room: Room) -> Tensor:
        """D [m, C, C], what is left between query and key; 0 where the key is later, and not seen."""
        past = self.total - self.total.transpose(-1, -2)
        # Between a key and a query on its other side the difference is positive: what it becomes is cut off, or the
        # difference of that side is the smaller one.
        if self.before is None:
            return room.between.copy_(past).exp_().tril_()
        later = self.before.transpose(-1, -2) - self.before
        return room.between.copy_(torch.minimum(past, later, out=past)).exp_()


def chunk_decay(x: Arguments, block: Block) -> Decay | None:
    """The decay in the chunks of a block; None without one."""
    if x.log_decay is None:
        return None
    total = running_sum(_steps(x.log_decay, x, block), -2, x.compute_dtype)
    since_start, until_end = _left(x, total, total[:, -1:] - total)
    past = Fade(since_start, until_end, _by_chunk(since_start[:, -1:], block))
    if x.later_decay is None:
        return Decay(past, None, total, None)
    steps = _steps(x.later_decay, x, block)
    through = running_sum(steps, -2, x.compute_dtype)
    before = torch.zeros_like(through)
    before[:, 1:] = through[:, :-1]
    since_start, until_end, whole = _left(x, before, through[:, -1:] - before, through[:, -1:])
    return Decay(past, Fade(until_end, since_start, _by_chunk(whole, block)), total, before)


def past_gradient(by_token: Tensor, states: Boundaries, grad_states: Boundaries, with_z: bool) -> Tensor:
    """The gradient of ``log_decay`` [m, C] from those of its running total by the chunk's tokens, which it overwrites,
    and of the state after the chunk, which carries exp(+total_C)."""
    by_token[:, -1] += _dot(states.written, grad_states.written, with_z)
    return by_token.flip(-1).cumsum(-1).flip(-1)


def later_gradient(by_token: Tensor, states: Boundaries, grad_states: Boundaries, with_z: bool) -> Tensor:
    """The gradient of ``later_decay`` [m, C] from those of its running sums without the own step, by the chunk's
    tokens, and of the state behind the chunk, whose every reader carries exp of the sum of all steps."""
    through = by_token.flip(-1).cumsum(-1).flip(-1)
    through = through.sub_(by_token)
    return through.add_(_dot(states.read, grad_states.read, with_z)[:, None])


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _steps(log_decay: Tensor, x: Arguments, block: Block) -> Tensor:
    """[m, C, 1]."""
    return view(log_decay, block, x.k.shape[2]).reshape(-1, block.C, 1)


def _left(x: Arguments, *sums: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.to(x.compute_dtype).exp() for part in sums)


def _by_chunk(whole: Tensor, block: Block) -> Sequence[Tensor]:
    return whole.unflatten(0, (block.n, -1)).unbind()


def _dot(states: State, gradients: State, with_z: bool) -> Tensor:
    """[m], of states and their gradients; overwrites the states."""
    total = torch.zeros((), dtype=states.kv.dtype, device=states.kv.device)
    for field, gradient in zip(states[: 1 + with_z], gradients, strict=False):
        assert field is not None and gradient is not None
        total = total + field.mul_(gradient).sum((-1, -2))
    return total
