"""What is timed against what: attention of one shape as a function without arguments, for each contender.

Here are the implementations of `leapformer.ops` and PyTorch's own attention. Whoever has more hands them to the
benchmark as `Contender`s of their own.

Letters: B batch, N tokens, H heads, G key/value heads, K key and value width, r hidden size of the LeaP module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import leapformer.ops
from leapformer.ops import LeapWeights, Staircase, cosine_factors, leap_attention, linear_attention

SDPA = "SDPA"
LEAP = " + LeaP"  # after the name of an implementation: with the two learned modules, from plain q and k
CHUNK = 64  # of the count of useful operations
BACKWARD_FLOPS = 3.5  # forward and backward together, in forwards
PLAIN, FACTORS, ANGLES, DECAY, BOTH_WAYS = "plain", "factors", "angles", "decay", "decay, later keys too"
FORMS = (PLAIN, FACTORS, ANGLES, DECAY, BOTH_WAYS)  # of causal attention, each with what it needs and no more
MEMORY_KEPT = ", memory kept"  # after a name: in a process whose allocator keeps what was freed

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One shape of attention. `leap`: learned proportions are a part of the work, not only a contender of their own."""

    name: str
    batch: int
    heads: int
    width: int
    visible: Literal["causal", "all", "wait-k"] = "causal"
    groups: int | None = None
    masked: bool = False
    hidden: int = 16
    leap: bool = False

    @property
    def kv_heads(self) -> int:
        return self.groups or self.heads


CAUSAL = Shape("causal", batch=1, heads=8, width=64)
LRA = Shape("LRA", batch=32, heads=2, width=32, visible="all", hidden=32, leap=True)
LONG = Shape("long", batch=1, heads=4, width=64)


def useful_flops(shape: Shape, length: int, *, backward: bool) -> float:
    """Operations that the result needs, by the count that the targets are written in.

    Per token and head, forward: 2 ((C + 1) / 2 (K + V) + 2 R K V) with chunks of C = 64 and R = 2; without a causal
    mask the first term, of the pairs inside a chunk, falls away.
    """
    inside_chunk = 0.0 if shape.visible == "all" else (CHUNK + 1) / 2 * 2 * shape.width
    forward = 2 * (inside_chunk + 2 * 2 * shape.width**2) * shape.batch * shape.heads * length
    return forward * (BACKWARD_FLOPS if backward else 1.0)


def cpu_impls() -> list[str]:
    """The linear implementations of `leapformer.ops` that run on this machine's processor."""
    available = getattr(leapformer.ops, "available_impls", None)
    names = ["torch"] if available is None else list(available())
    return [name for name in names if name not in ("auto", "reference", "triton")]


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    Attributes:
        prepare: draws the tensors of one shape and length and returns the call that is timed.
        home: the module whose `contender(name)` gives it in another process.
        quadratic: its work grows with the square of the length where a query does not see all keys.
        pairs: about how many float32 matrices of all pairs it holds then, forward, and forward and backward.
        memory_kept: where LeaP modules are a part of the work, it is timed with memory kept too.
        why_not: why it can't run on a processor; empty where it can.
    """

    name: str
    prepare: Callable[[Shape, int, Inputs], Call]
    home: str = __name__
    quadratic: bool = False
    pairs: tuple[int, int] = (0, 0)
    memory_kept: bool = False
    why_not: str = ""

    def call(
        self, shape: Shape, length: int, *, backward: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Call:
        """One call: forward without gradients, or forward and backward with a dense random cotangent.

        Each contender starts from tensors of ``dtype`` in the layout it likes best. Ours start from plain queries and
        keys, as SDPA does, and a proportion for each: ReLU, sines and cosines are inside.
        """
        return self.prepare(shape, length, Inputs(backward, device, dtype))

    def bytes_needed(self, shape: Shape, length: int, *, backward: bool) -> float:
        """About the largest memory of a call, for those that keep all pairs; 0 where it is no concern."""
        if shape.visible == "all":
            return 0.0
        return shape.batch * shape.heads * length**2 * 4 * self.pairs[backward]


def contender(name: str) -> Contender:
    """SDPA, or an implementation of `leapformer.ops` with LEAP after its name or without."""
    if name == SDPA:
        return Contender(SDPA, _sdpa, quadratic=True)
    return Contender(name, partial(_ours, name.removesuffix(LEAP), leap=name.endswith(LEAP)))


def contenders_for(shape: Shape) -> list[Contender]:
    """Those that every installation has, ours first."""
    ours = [name + suffix for name in cpu_impls() for suffix in (("",) if not shape.leap else ()) + (LEAP,)]
    return [contender(name) for name in (*ours, SDPA)]


def _ours(impl: str, shape: Shape, length: int, inputs: Inputs, *, leap: bool) -> Callable[[], object]:
    B, N, H, G, K = shape.batch, length, shape.heads, shape.kv_heads, shape.width
    q, k, v = inputs.leaf(B, N, H, K), inputs.leaf(B, N, G, K), inputs.leaf(B, N, G, K)
    keywords: dict = {"visible": Staircase.wait_k(3, 1) if shape.visible == "wait-k" else shape.visible, "impl": impl}
    if shape.masked:  # one key in eight is padding, at the end
        keywords["key_mask"] = (torch.arange(N, device=inputs.device) < N - N // 8).expand(B, N)
    if leap:
        q_leap, k_leap = inputs.leap(shape), inputs.leap(shape)
        leaves = [q, k, v, *q_leap, *k_leap]
        weights = LeapWeights(*q_leap), LeapWeights(*k_leap)
        return inputs.call(lambda: leap_attention(q, k, v, *weights, **keywords).output, leaves, (B, N, H, K))
    p_q, p_k = inputs.proportion(B, N, H), inputs.proportion(B, N, G)

    def attend() -> Tensor:
        factors = cosine_factors(p_q), cosine_factors(p_k)
        return linear_attention(q, k, v, *factors, relu=True, **keywords).output

    return inputs.call(attend, [q, k, v, p_q, p_k], (B, N, H, K))


def form(impl: str, name: str) -> Contender:
    """An implementation of `leapformer.ops` with one of FORMS. A rank is 2: FACTORS are made from the angles in the
    call, as a model makes them; ANGLES go in as they are."""
    return Contender(name, partial(_form, impl, name))


def _form(impl: str, name: str, shape: Shape, length: int, inputs: Inputs) -> Callable[[], object]:
    B, N, H, K = shape.batch, length, shape.heads, shape.width
    leaves = [inputs.leaf(B, N, H, K) for _ in range(3)]
    keywords: dict = {"visible": "all" if name == BOTH_WAYS else "causal", "relu": True, "impl": impl}
    if name in (DECAY, BOTH_WAYS):
        more = [inputs.log_decay(B, N, H)]
    else:
        more = [inputs.proportion(B, N, H, 1) for _ in range(0 if name == PLAIN else 2)]

    def attend() -> Tensor:
        if name == FACTORS:
            factors = [torch.cat([angles.cos(), angles.sin()], dim=-1) for angles in more]
            return linear_attention(*leaves, *factors, **keywords).output
        names = ("q_angles", "k_angles") if name == ANGLES else ("log_decay",) if more else ()
        return linear_attention(*leaves, **dict(zip(names, more, strict=True)), **keywords).output

    return inputs.call(attend, [*leaves, *more], (B, N, H, K))


def _sdpa(shape: Shape, length: int, inputs: Inputs) -> Callable[[], object]:
    size = (shape.batch, shape.heads, length, shape.width)
    q, k, v = (inputs.leaf(*size) for _ in range(3))
    causal = shape.visible == "causal"
    return inputs.call(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), [q, k, v], size)


class Inputs:
    """Inputs of one call, the same for the same order of requests, and the call itself."""

    def __init__(self, backward: bool, device: str, dtype: torch.dtype) -> None:
        self.backward, self.device, self.dtype = backward, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def leaf(self, *size: int) -> Tensor:
        return self._normal(*size).to(self.dtype).requires_grad_(self.backward)

    def proportion(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator, device=self.device).requires_grad_(self.backward)

    def log_decay(self, *size: int) -> Tensor:
        """Half of a state is left after some ten tokens."""
        return self._normal(*size).square().mul_(-0.05).requires_grad_(self.backward)

    def leap(self, shape: Shape) -> list[Tensor]:
        """w1, b1, w2, b2 of one module."""
        r, K = shape.hidden, shape.width
        scaled = [self._normal(*size) / K**0.5 for size in ((1, r, K), (1, r), (1, r), (1,))]
        return [weight.requires_grad_(self.backward) for weight in scaled]

    def call(self, attend: Callable[[], Tensor], leaves: list[Tensor], size: tuple[int, ...]) -> Callable[[], object]:
        if not self.backward:

            def forward() -> object:
                with torch.no_grad():
                    return attend()

            return forward
        cotangent = self._normal(*size).to(self.dtype)
        return lambda: torch.autograd.grad(attend(), leaves, cotangent)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)
