"""One call of the kernels: tensors in, addresses and strides out. Letters as in csrc/interface.h."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leapformer.ops.arguments import Arguments, Incoming, LeapWeights
from leapformer.ops.checks import boundaries
from leapformer.ops.native.library import LIBRARY, PROBLEM, threads

CHECKPOINT = 512  # keys between two states that the forward pass keeps: TILE * SUPER in csrc


class Outputs(NamedTuple):
    """output [B, T, H, V]; final kv, z; normaliser [B, T, H]; checkpoints, empty
    where no gradient will be asked for."""

    output: Tensor
    kv: Tensor
    z: Tensor
    normaliser: Tensor
    checkpoints: Tensor


class GradientBuffers(NamedTuple):
    """Buffers for the gradients; factors, or angles, with all heads, modules as [slots, heads, weights]."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factors: Tensor | None
    k_factors: Tensor | None
    q_leap: Tensor | None
    k_leap: Tensor | None
    log_decay: Tensor | None
    later_decay: Tensor | None
    kv: Tensor | None
    z: Tensor | None


_NOTHING: Any = [None] * 11
_NO_GRADIENTS = GradientBuffers(*_NOTHING)
_NOTHING = (0, 0, 0, 0, 0)  # a view of nothing


def pieces(x: Arguments) -> int:
    """Into how many parts each sequence of each key head is cut, so that few of them still use all threads.

    The states that the parts start from are summed up first, which costs about a third of the forward pass again, so it
    is done where the threads would stand idle for longer than that.
    """
    n = threads()
    if n == 1 or x.is_step:
        return 1
    units = x.sequences * x.k.shape[2]
    if units == 0 or n * -(-units // n) <= 1.4 * units:
        return 1
    longest = max(x.q.shape[1], x.k.shape[1]) * x.q.shape[0] // x.sequences
    return max(1, min(-(-4 * n // units), longest // CHECKPOINT))


def slots(x: Arguments, pieces: int) -> int:
    """Parts of the work. Each has its own sum of the modules' gradients, so that the order of sums is fixed."""
    units = x.sequences * x.k.shape[2] * pieces
    return units if x.q_w2 is None else min(units, 64)


def checkpoints(x: Arguments) -> tuple[int, int, int]:
    """Shape of the states that the backward pass starts from."""
    (B, S, G, K), V = x.k.shape, x.v.shape[-1]
    # Two more than needed: a graph would depend on whether there are none, or one.
    rows = (1 if x.cu_seqlens is not None else B) * (S // CHECKPOINT) + 2
    states = G if x.later_decay is None else 2 * G  # of earlier keys, and of later ones
    return (rows if x.causal or x.counts is not None else 0), states, x.rank * K * (V + 1)


def both_halves(incoming: Incoming, saved: Outputs) -> Incoming:
    """With zeros for one half of the state where only the other got a gradient."""
    output, kv, z = incoming
    if kv is None and z is None:
        return incoming
    return Incoming(
        output, torch.zeros_like(saved.kv) if kv is None else kv, torch.zeros_like(saved.z) if z is None else z
    )


def run(
    name: str, x: Arguments, out: Outputs, given: Incoming | None = None, grads: GradientBuffers | None = None
) -> None:
    """Calls ``leapformer_<name>``. Whatever is made here for the call lives until it returns."""
    assert LIBRARY is not None
    q, k, v, mask = x.q, x.k, x.v, x.key_mask
    B, T, H, K = q.shape
    _, S, G, V = v.shape
    sequences, cut = x.sequences, pieces(x)
    angles = x.q_angles is not None
    factors = (_turns(x.q_angles), _turns(x.k_angles)) if angles else (_wide(x.q_factors), _wide(x.k_factors))
    log_decay, later_decay = _wide(x.log_decay), _wide(x.later_decay)
    kv, z = _ready(x.kv), _ready(x.z)
    bounds, counts = _bounds(x), _counts(x.counts)
    modules = _module(x.q_leap), _module(x.k_leap)
    g = grads or _NO_GRADIENTS
    passed, passed_state = _NOTHING, []
    if given is not None:
        passed, passed_state = _view(given.output), [_ready(t) for t in given[1:]]
    integers = (
        q.dtype is torch.bfloat16,
        B,
        sequences,
        T,
        S,
        H,
        G,
        K,
        V,
        x.rank,
        x.causal,
        not x.causal and (counts is None or T == 0),
        x.normalize,
        x.q_w2 is not None,
        threads(),
        slots(x, cut),
        cut,
        x.relu,
        angles,
    )
    fields = (
        q.data_ptr(),
        *q.stride(),
        k.data_ptr(),
        *k.stride(),
        v.data_ptr(),
        *v.stride(),
        *_view(factors[0]),
        *_view(factors[1]),
        *_view(log_decay),
        *_view(later_decay),
        *_addresses(kv, z),
        *((0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())),
        *((0, 0) if counts is None else (counts.data_ptr(), counts.stride(0) if counts.shape[0] > 1 else 0)),
        *_addresses(*bounds, *out),
        *passed,
        *(_addresses(*passed_state) if passed_state else (0, 0)),
        *_addresses(g.q, g.k, g.v, g.q_factors, g.k_factors, g.log_decay, g.later_decay, g.kv, g.z),
        *_leap(modules[0], g.q_leap),
        *_leap(modules[1], g.k_leap),
    )
    if not getattr(LIBRARY, f"leapformer_{name}")(PROBLEM.pack(*integers, x.eps, *fields)):
        widths = f"K={K}, V={V}, R={x.rank}"
        raise MemoryError(f"native linear attention: no memory for the kernels' own buffers ({name}, {widths})")


def _bounds(x: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Boundaries as the kernels read them, int64 and without holes: they reach into memory by them."""
    if x.cu_seqlens is None or x.cu_seqlens_k is None:
        return None, None
    boundaries(x.cu_seqlens, x.cu_seqlens_k, x.q.shape[1], x.k.shape[1], same=x.causal)
    return x.cu_seqlens.to(torch.int64).contiguous(), x.cu_seqlens_k.to(torch.int64).contiguous()


def _counts(counts: Tensor | None) -> Tensor | None:
    """[B or 1, T] without holes; one row where all samples share it."""
    return None if counts is None else (counts if counts.stride(0) else counts[:1]).contiguous()


def _view(t: Tensor | None) -> tuple[int, ...]:
    """Address and four strides; what is shared by all heads has stride 0 there, what has no width none."""
    if t is None:
        return _NOTHING
    strides = [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.data_ptr(), *strides, *[0] * (4 - t.dim())


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def is_ready(t: Tensor | None) -> bool:
    """Whether the kernels can work on a state or weight as it is."""
    return t is not None and t.dtype == torch.float32 and t.is_contiguous()


def _ready(t: Tensor | None) -> Tensor | None:
    return t if t is None or is_ready(t) else t.to(torch.float32).contiguous()


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float32 else t.to(torch.float32)


def _turns(angles: Tensor | None) -> Tensor | None:
    """Angles in float32; those that are more precise lose their full turns first."""
    if angles is None or angles.dtype != torch.float64:
        return _wide(angles)
    return angles.remainder(2 * math.pi).to(torch.float32)


def _module(m: LeapWeights | None) -> LeapWeights | None:
    if m is None:
        return None
    b1 = m.w2.new_zeros(m.w1.shape[:2]) if m.w1 is not None and m.b1 is None else m.b1
    ready: Any = map(_ready, (m.w1, b1, m.w2, m.b2))
    return LeapWeights(*ready)


def _leap(m: LeapWeights | None, gradient: Tensor | None) -> tuple[int, ...]:
    if m is None:
        return 0, 0, 0, 0, 0, 0, 0
    return *_addresses(*m, gradient), m.w2.shape[0], 0 if m.w1 is None else m.w1.shape[1]
