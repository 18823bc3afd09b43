"""Memory in which the dense core computes one block after another.

Letters: n chunks of a block of B samples and G key/value heads, r query heads for each of these, C tokens of a chunk, F
= R K feature width, V value width, m = n B G matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from leapformer.ops.arguments import Arguments
from leapformer.ops.blocking import Block


class State(NamedTuple):
    """kv [B G, F, V] and z [B G, 1, F], or their gradients, in the compute dtype; z None where nothing depends on
    it."""

    kv: Tensor
    z: Tensor | None


class Boundaries:
    """States, or their gradients, at the start of a block, between its chunks and at its end: kv [n + 1, B G, F, V] and
    z [n + 1, B G, 1, F], and views of them. ``read`` [m, ...] are those that each chunk reads, ``written`` those on its
    other side. It reads what comes before it; with ``later`` what comes behind it."""

    def __init__(self, kv: Tensor, z: Tensor, later: bool = False) -> None:
        self._later = later
        self.steps = kv.unbind(), z.unbind()
        before = State(kv[:-1].flatten(0, 1), z[:-1].flatten(0, 1))
        after = State(kv[1:].flatten(0, 1), z[1:].flatten(0, 1))
        self.read, self.written = (after, before) if later else (before, after)
        self.read_T, self.written_T = self.read.kv.transpose(-1, -2), self.written.kv.transpose(-1, -2)

    def run(self, carry: State, whole: Sequence[Tensor] | None, gradients: bool = False) -> None:
        """``written`` holds what each chunk adds (of gradients ``read``): make running sums of it from ``carry`` on,
        which moves to their end. ``whole``: the decay of each chunk [B G, 1, 1]."""
        backwards = self._later != gradients
        if backwards and whole is not None:
            whole = whole[::-1]
        for total, steps in zip(carry, self.steps, strict=True):
            if total is None:
                continue
            order = steps[::-1] if backwards else steps
            order[0].copy_(total)
            for c, (old, new) in enumerate(pairwise(order)):
                new.add_(old) if whole is None else new.addcmul_(old, whole[c])
            total.copy_(order[-1])


class Sizes(NamedTuple):
    """The sizes of a block, K the width of one key; other letters as above."""

    n: int
    B: int
    G: int
    r: int
    C: int
    K: int
    F: int
    V: int

    @property
    def m(self) -> int:
        return self.n * self.B * self.G


class Buffer:
    """A field of ``Room`` or ``Direction``: a tensor of this shape, made when it is first asked for and an ordinary
    attribute from then on."""

    def __init__(self, shape: Callable[[Sizes], tuple[int, ...]]) -> None:
        self._shape = shape

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, room: Room | Direction, owner: type) -> Tensor:
        value = room.__dict__[self._name] = room.take(self._name, self._shape(room.sizes))
        return value


class Room:
    """Where blocks of one shape are computed: buffers in the compute dtype, whose memory is that of all other blocks
    too."""

    phi_q = Buffer(lambda s: (s.m, s.r * s.C, s.F))
    grad_phi_q = Buffer(lambda s: (s.m, s.r * s.C, s.F))
    relu_q = Buffer(lambda s: (s.n, s.B, s.G, s.r, s.C, s.K))
    product_q = Buffer(lambda s: (s.n, s.B, s.G, s.r, s.C, s.K))
    phi_k = Buffer(lambda s: (s.m, s.C, s.F))
    grad_phi_k = Buffer(lambda s: (s.m, s.C, s.F))
    relu_k = Buffer(lambda s: (s.n, s.B, s.G, 1, s.C, s.K))
    product_k = Buffer(lambda s: (s.n, s.B, s.G, 1, s.C, s.K))
    v = Buffer(lambda s: (s.m, s.C, s.V))
    grad_v = Buffer(lambda s: (s.m, s.C, s.V))
    g = Buffer(lambda s: (s.m, s.r * s.C, s.V))
    out = Buffer(lambda s: (s.m, s.r * s.C, s.V))
    scores = Buffer(lambda s: (s.m, s.r * s.C, s.C))
    grad_scores = Buffer(lambda s: (s.m, s.r * s.C, s.C))
    between = Buffer(lambda s: (s.m, s.C, s.C))
    from_state = Buffer(lambda s: (s.m, s.C, s.F))

    def __init__(self, x: Arguments, block: Block, memory: dict[str, Tensor]) -> None:
        self._x, self._memory = x, memory
        (H, K), (G, V) = x.q.shape[2:], x.v.shape[2:]
        self.sizes = Sizes(block.n, block.B, block.G, H // G, block.C, K, x.rank * K, V)
        self.ones = x.q.new_ones(block.C, 1, dtype=x.compute_dtype).expand(self.sizes.m, block.C, 1)

    @cached_property
    def phi_q_T(self) -> Tensor:
        return self.phi_q.transpose(-1, -2)

    @cached_property
    def phi_k_T(self) -> Tensor:
        return self.phi_k.transpose(-1, -2)

    @cached_property
    def v_T(self) -> Tensor:
        return self.v.transpose(-1, -2)

    @cached_property
    def past(self) -> Direction:
        return Direction(self, later=False)

    @cached_property
    def later(self) -> Direction:
        return Direction(self, later=True)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory of this shape: what another block has called so, where it is large enough."""
        size = math.prod(shape)
        buffer = self._memory.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._memory[name] = self._x.q.new_empty(size, dtype=self._x.compute_dtype)
        return buffer[:size].view(shape)


class Direction:
    """What a room holds for the states of one direction, of the past or of what is later, and for their gradients."""

    weighted_v = Buffer(lambda s: (s.m, s.C, s.V))
    weighted_g = Buffer(lambda s: (s.m, s.r * s.C, s.V))
    _kv = Buffer(lambda s: (s.n + 1, s.B * s.G, s.F, s.V))
    _z = Buffer(lambda s: (s.n + 1, s.B * s.G, 1, s.F))
    _grad_kv = Buffer(lambda s: (s.n + 1, s.B * s.G, s.F, s.V))
    _grad_z = Buffer(lambda s: (s.n + 1, s.B * s.G, 1, s.F))

    def __init__(self, room: Room, later: bool) -> None:
        self.sizes = room.sizes
        self._room, self._later = room, later

    @cached_property
    def states(self) -> Boundaries:
        return Boundaries(self._kv, self._z, self._later)

    @cached_property
    def grad_states(self) -> Boundaries:
        return Boundaries(self._grad_kv, self._grad_z, self._later)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._room.take(f"later {name}" if self._later else name, shape)


class Workspace:
    """The rooms of a call, one for each shape of block. Fresh memory for every block would cost page faults."""

    def __init__(self, x: Arguments) -> None:
        self._x = x
        self._rooms: dict[tuple[int, ...], Room] = {}
        self._memory: dict[str, Tensor] = {}

    def __getitem__(self, block: Block) -> Room:
        shape = (block.B, block.G, block.n, block.C)
        if shape not in self._rooms:
            self._rooms[shape] = Room(self._x, block, self._memory)
        return self._rooms[shape]
