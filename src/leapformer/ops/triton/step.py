"""One token after a state: a kernel of its own. Letters as in sweeps.py."""

# Triton compiles this, and not all of it is Python to a type checker.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from leapformer.ops.triton.loading import kept_tokens, load_factors, load_scalars, load_values, load_x
from leapformer.ops.triton.states import state_places


@triton.jit
def step(
    q,
    k_side,
    kv,
    z,
    new_kv,
    new_z,
    out,
    out_strides,
    groups,
    share,
    eps,
    c,
    NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr,
):
    """One token: its key is added to the state, and its query reads it. Grid: (batch, G). C is 1.

    ``new_kv`` and ``new_z`` may be ``kv`` and ``z`` (None: there is no past) themselves.

    The features are kept as vectors: a product with one row is no work for tensor cores.
    """
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, c.BK)
    keep = kept_tokens(k_side, b, 0, 1, c)
    x, factors = _one_token(k_side, b, g, keep, k, c)
    fade = 1.0
    if DECAY:
        fade = tl.exp(tl.load(k_side.decay + b * groups + g))
    place = b * groups + g
    sums = ()
    for rank in tl.static_range(c.R):
        at = place * (c.R * c.K) + rank * c.K + k
        added = x * tl.sum(factors[rank], axis=0)
        if z is not None:
            added += tl.load(z + at, mask=k < c.K, other=0.0) * fade
        tl.store(new_z + at, added, mask=k < c.K)
        sums = sums + (added,)
    for tile in range(tl.cdiv(c.V, c.BV)):
        v = tile * c.BV + tl.arange(0, c.BV)
        w = tl.reshape(load_values(k_side, b, g, 0, keep, v, c).to(tl.float32), [c.BV])
        S = ()
        for rank in tl.static_range(c.R):
            kv_at, kv_in, _z_at, _z_in = state_places(k, v, rank, c)
            row = place * (c.R * c.K * c.V)
            new = (x * tl.sum(factors[rank], axis=0))[:, None] * w[None, :]
            if kv is not None:
                new += tl.load(kv + row + kv_at, mask=kv_in, other=0.0) * fade
            tl.store(new_kv + row + kv_at, new, mask=kv_in)
            S = S + (new,)
        for j in range(share):
            h = g * share + j
            x_q, factors_q = _one_token(q, b, h, kept_tokens(q, b, 0, 1, c), k, c)
            y = tl.zeros([c.BV], tl.float32)
            total = 0.0
            for rank in tl.static_range(c.R):
                query = x_q * tl.sum(factors_q[rank], axis=0)
                y += tl.sum(query[:, None] * S[rank], axis=0)
                total += tl.sum(query * sums[rank], axis=0)
            if NORMALIZE:
                y = y / tl.maximum(total, eps)
            base = out + b * out_strides[0] + h * out_strides[2]
            tl.store(base + v, y.to(out.dtype.element_ty), mask=v < c.V)


@triton.jit
def _one_token(side, b, h, keep, k, c):
    """(x [BK] in float32, R factors [1]) of the only token; a LeaP module is run on it."""
    x = load_x(side, b, h, 0, keep, k, c).to(tl.float32)
    p = 0.0
    if side.w2 is not None:
        s1, sb, s2, sb2 = side.leap_strides
        if side.w1 is None:
            weight = tl.load(side.w2 + h * s2 + k, mask=k < c.K, other=0.0).to(tl.float32)
            score = tl.sum(x * weight[None, :], axis=1)
        else:
            u = tl.arange(0, c.BH)
            matrix = tl.load(
                side.w1 + h * s1 + u[:, None] * c.K + k[None, :],
                mask=(u < side.r)[:, None] & (k < c.K)[None, :],
                other=0.0,
            )
            hidden = tl.sum(matrix.to(tl.float32) * x, axis=1)
            if side.b1 is not None:
                hidden += tl.load(side.b1 + h * sb + u, mask=u < side.r, other=0.0).to(tl.float32)
            weight = tl.load(side.w2 + h * s2 + u, mask=u < side.r, other=0.0).to(tl.float32)
            score = tl.zeros([1], tl.float32) + tl.sum(tl.maximum(hidden, 0.0) * weight, axis=0)
        p = score + tl.load(side.b2 + h * sb2).to(tl.float32)
    elif side.score is not None:
        p = load_scalars(side, side.score, b, h, 0, keep, c)
    return tl.reshape(x, [c.BK]), load_factors(side, p, b, h, 0, keep, c)
