"""LeaP modules in kernels of their own: their scores where a sweep has no room for them, and their gradients."""

# Triton compiles this, and not all of it is Python to a type checker.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from leapformer.ops.triton.loading import kept_tokens, load_x, module_score


@triton.jit
def scores(side, c):
    """Runs a LeaP module alone, where heads are so wide that a sweep has no registers left for it. Grid: (tokens / C,
    batch, head)."""
    token, b, h = tl.program_id(0) * c.C, tl.program_id(1).to(tl.int64), tl.program_id(2)
    k = tl.arange(0, c.BK)
    left = side.tokens - token
    keep = kept_tokens(side, b, token, left, c)
    p = module_score(side, load_x(side, b, h, token, keep, k, c), h, k, c)
    i = tl.arange(0, c.C)
    tl.store(side.score + (b * side.heads + h) * side.tokens + token + i, p, mask=i < left)


@triton.jit
def leap_gradients(
    x, x_strides, score, dp, dx, dx_strides, mask, weights, partial, tokens, heads, rows, K, W,
    per_head: tl.constexpr, r: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Through one LeaP module: adds to dx [batch, token, head, K], and sums each program's gradients of the weights.

    ``partial`` [programs, heads or 1, W] with W = r K + r + r + 1 numbers w1, b1, w2, b2 (K + 1 without a hidden
    layer).
    Grid: (programs, heads where each head has a module of its own).
    """
    w1, b1, w2, b2, s1, sb, s2, sb2, _r = weights
    own = tl.program_id(1)
    k = tl.arange(0, BK)
    u = tl.arange(0, BH)
    i = tl.arange(0, C)
    dw1 = tl.zeros([BH, BK], tl.float32)
    db1 = tl.zeros([BH], tl.float32)
    dw2 = tl.zeros([BH if r > 0 else BK], tl.float32)
    db2 = 0.0
    # All rows [head, token] of the batch, or the tokens of one head.
    for block in range(tl.program_id(0), tl.cdiv(rows, C), tl.num_programs(0)):
        j = i.to(tl.int64) + block * C
        inside = j < rows
        if per_head:
            h, t, b = own + j * 0, j % tokens, j // tokens
        else:
            t, h, b = j % tokens, (j // tokens) % heads, j // tokens // heads
        keep = inside
        if mask is not None:
            keep = keep & (tl.load(mask + b * tokens + t, mask=inside, other=0) != 0)
        inner = keep[:, None] & (k < K)[None, :]
        at = (b * x_strides[0] + t * x_strides[1] + h * x_strides[2])[:, None] + k[None, :]
        features = tl.load(x + at, mask=inner, other=0.0).to(tl.float32)
        features = tl.where(features < 0, 0.0, features)
        where = (b * heads + h) * tokens + t
        q = tl.load(score + where, mask=keep, other=0.0)
        slope = tl.load(dp + where, mask=keep, other=0.0) * tl.sigmoid(q) * tl.sigmoid(-q)
        db2 += tl.sum(slope, axis=0)
        if r > 0:
            part = (u < r)[:, None] & (k < K)[None, :]
            matrix = tl.load(w1 + own * s1 + u[:, None] * K + k[None, :], mask=part, other=0.0).to(tl.float32)
            hidden = tl.dot(features, tl.trans(matrix), input_precision=PRECISION)
            if b1 is not None:
                hidden += tl.load(b1 + own * sb + u, mask=u < r, other=0.0).to(tl.float32)[None, :]
            weight = tl.load(w2 + own * s2 + u, mask=u < r, other=0.0).to(tl.float32)
            dw2 += tl.sum(tl.maximum(hidden, 0.0) * slope[:, None], axis=0)
            dhidden = tl.where(hidden > 0, slope[:, None] * weight[None, :], 0.0)
            db1 += tl.sum(dhidden, axis=0)
            dw1 = tl.dot(tl.trans(dhidden), features, dw1, input_precision=PRECISION)
            more = tl.dot(dhidden, matrix, input_precision=PRECISION)
        else:
            weight = tl.load(w2 + own * s2 + k, mask=k < K, other=0.0).to(tl.float32)
            dw2 += tl.sum(features * slope[:, None], axis=0)
            more = slope[:, None] * weight[None, :]
        at = (b * dx_strides[0] + t * dx_strides[1] + h * dx_strides[2])[:, None] + k[None, :]
        gradient = tl.load(dx + at, mask=inner, other=0.0).to(tl.float32) + tl.where(features > 0, more, 0.0)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inner)
    base = partial + (tl.program_id(0) * tl.num_programs(1) + own) * W
    if r > 0:
        tl.store(base + u[:, None] * K + k[None, :], dw1, mask=(u < r)[:, None] & (k < K)[None, :])
        tl.store(base + r * K + u, db1, mask=u < r)
        tl.store(base + r * K + r + u, dw2, mask=u < r)
    else:
        tl.store(base + k, dw2, mask=k < K)
    tl.store(base + W - 1, db2)
