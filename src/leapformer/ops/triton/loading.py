"""What the GPU kernels load: which tokens are there, features, factors, values and decays. Letters as in sweeps.py."""

# Triton compiles this, and not all of it is Python to a type checker.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

ALL = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
COUNTS = tl.constexpr(2)
LEAST_STEP = tl.constexpr(-200.0)  # of a log decay, as in decay.py
# NumPy, on which Triton's interpreter runs, has no bfloat16 product.
EMULATED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


class Shape(NamedTuple):
    """What a kernel is compiled for, all ``tl.constexpr``: widths K and V and their tiles BK and BV, C tokens of a
    chunk, rank R, a LeaP module's hidden units rounded up BH, the type in which products take their operands DOT, and
    the PRECISION of products of float32."""

    K: Any
    V: Any
    R: Any
    C: Any
    BK: Any
    BV: Any
    BH: Any
    DOT: Any
    PRECISION: Any


class Side(NamedTuple):
    """Tokens of one side. x and w have strides [batch, token, head] and a dense last axis; None: there is none.

    What has one number for each token is float32 with tokens side by side: ``factors`` [batch, heads or 1, R, token]
    with strides [batch, head], or in their place ``angles`` [batch, heads or 1, R / 2, token]; ``score`` what gives
    proportions by its sigmoid, in place of factors, ``scale`` a further factor, ``aux`` the channel of the normaliser,
    ``decay`` the log decay and ``later`` that towards earlier queries, at the step before each token, all [batch, head,
    token].
    ``relu`` (1 or None): relu(x) is meant. ``w1``, ``b1``, ``w2``, ``b2``: weights of a LeaP module that computes
    ``score`` and stores it (w2 is None: there is none), with ``leap_strides`` from head to head and ``r``. ``mask``
    uint8 [batch, token].
    """

    x: Any
    x_strides: Any
    relu: Any
    factors: Any
    angles: Any
    factor_strides: Any
    score: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    leap_strides: Any
    r: Any
    w: Any
    w_strides: Any
    scale: Any
    aux: Any
    mask: Any
    decay: Any
    later: Any
    tokens: Any
    heads: Any


class Span(NamedTuple):
    """Sequences of one side and their segments: all alike, or packed (``cu`` and the tables of segments given)."""

    length: Any
    segments: Any
    sequences: Any
    segment_tokens: Any
    cu: Any
    rows: Any
    places: Any
    slots: Any


# ---- where things are ------------------------------------------------------------------------------------------------


@triton.jit
def locate(span, index):
    """Sequence and segment of a program; sequence ``span.sequences`` means that there is none."""
    if span.cu is None:
        return index // span.segments, index % span.segments
    else:
        return tl.load(span.rows + index), tl.load(span.places + index)


@triton.jit
def extent_of(span, n):
    """(row of the batch, first token, length, segments, first slot) of sequence n."""
    if span.cu is None:
        n64 = n.to(tl.int64)
        return n64, n64 * 0, n * 0 + span.length, n * 0 + span.segments, n64 * (span.segments + 1)
    else:
        start = tl.load(span.cu + n)
        length = tl.load(span.cu + n + 1) - start
        segments = (length + span.segment_tokens - 1) // span.segment_tokens
        return (
            n.to(tl.int64) * 0,
            start.to(tl.int64),
            length.to(tl.int32),
            segments.to(tl.int32),
            tl.load(span.slots + n).to(tl.int64),
        )


@triton.jit
def kept_tokens(side, b, token, left, c):
    """Which of the C tokens from ``token`` on are there: the sequence has ``left`` more, and the mask hides some."""
    i = tl.arange(0, c.C)
    keep = i < left
    if side.mask is not None:
        keep = keep & (tl.load(side.mask + b * side.tokens + token + i, mask=keep, other=0) != 0)
    return keep


@triton.jit
def tile_mask(keep, columns, width: tl.constexpr, BLOCK: tl.constexpr):
    """The mask [C, columns] of a tile; tiles that divide the width need no look at the columns."""
    if width % BLOCK == 0:
        return keep[:, None]
    else:
        return keep[:, None] & (columns < width)[None, :]


@triton.jit
def load_scalars(side, pointer, b, h, token, keep, c):
    """float32 numbers [C] of a [batch, head, token] array: tokens lie side by side, so no address is worked out for
    each."""
    i = tl.arange(0, c.C)
    return tl.load(pointer + (b * side.heads + h) * side.tokens + token + i, mask=keep, other=0.0)


# ---- features and values ---------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, c):
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=c.PRECISION)


@triton.jit
def add_dot(acc, a, b, c):
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=c.PRECISION)


@triton.jit
def _sine(t):
    """sin(pi/2 t) for t in [0, 1], within float32; without the branches of a sine for any argument."""
    x = t * 1.5707963267948966
    y = x * x
    series = 1.6059043836821613e-10
    series = series * y - 2.505210838544172e-08
    series = series * y + 2.7557319223985893e-06
    series = series * y - 1.984126984126984e-04
    series = series * y + 8.333333333333333e-03
    series = series * y - 0.16666666666666666
    return x + x * y * series


@triton.jit
def cosine_of(score):
    """cos(pi/2 P) of P = sigmoid(score) as sin(pi/2 (1 - P)): never negative, and right where P is rounded to 1."""
    return _sine(tl.sigmoid(-score))


@triton.jit
def sine_of(score):
    """sin(pi/2 P) of P = sigmoid(score)."""
    return _sine(tl.sigmoid(score))


@triton.jit
def cosine_and_sine(angle):
    """Of an angle of any size, within float32: branches, and memory for digits of pi, are what a library's would take.

    Quarters of a turn are counted in float64, so an angle's error is its size times 2^-52, which is less than float32's
    own for all angles whose neighbours in float32 are less than turns apart.
    """
    quarters = angle.to(tl.float64) * 0.6366197723675814
    whole = tl.floor(quarters)
    rest = quarters - whole
    rising, falling = _sine(rest.to(tl.float32)), _sine((1.0 - rest).to(tl.float32))
    quarter = whole.to(tl.int64)
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, rising, falling), tl.where(odd, falling, rising)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def load_x(side, b, h, token, keep, k, c):
    """x [C, BK], or relu(x), in its own dtype."""
    i = tl.arange(0, c.C)
    base = side.x + b * side.x_strides[0] + token * side.x_strides[1] + h * side.x_strides[2]
    x = tl.load(base + i[:, None] * side.x_strides[1] + k[None, :], mask=tile_mask(keep, k, c.K, c.BK), other=0.0)
    if side.relu is not None:
        relu = tl.where(x.to(tl.float32) < 0, 0.0, x.to(tl.float32))  # a NaN stays one
        x = relu.to(side.x.dtype.element_ty)
    return x


@triton.jit
def load_factors(side, p, b, h, token, keep, c):
    """R factors [C], float32: cosine and sine of the proportion that score p gives, or of angles, or loaded, or 1."""
    if side.score is not None:
        return (cosine_of(p), sine_of(p))
    elif side.angles is not None:
        cosines, sines = (), ()
        for rank in tl.static_range(c.R // 2):
            cosine, sine = cosine_and_sine(_load_row(side, side.angles, rank, b, h, token, keep, c))
            cosines = cosines + (cosine,)
            sines = sines + (sine,)
        return cosines + sines
    else:
        factors = ()
        for rank in tl.static_range(c.R):
            if side.factors is not None:
                factors = factors + (_load_row(side, side.factors, rank, b, h, token, keep, c),)
            else:
                factors = factors + (tl.zeros([c.C], tl.float32) + 1.0,)
        return factors


@triton.jit
def _load_row(side, pointer, row, b, h, token, keep, c):
    """float32 numbers [C] of one row of ``factors`` or ``angles``."""
    base = pointer + b * side.factor_strides[0] + h * side.factor_strides[1] + row * side.tokens + token
    return tl.load(base + tl.arange(0, c.C), mask=keep, other=0.0)


@triton.jit
def times(factors, by, c):
    """Every one of R times ``by``."""
    product = ()
    for rank in tl.static_range(c.R):
        product = product + (factors[rank] * by,)
    return product


@triton.jit
def module_score(side, x, h, k, c):
    """The score [C] of ReLU'd x [C, BK], BK >= K."""
    s1, sb, s2, sb2 = side.leap_strides
    if side.w1 is None:
        weight = tl.load(side.w2 + h * s2 + k, mask=k < c.K, other=0.0).to(tl.float32)
        score = tl.sum(x.to(tl.float32) * weight[None, :], axis=1)
    else:
        score = tl.zeros([x.shape[0]], tl.float32)
        for first in range(0, c.BH, 16):  # a few hidden units at a time: all weights at once would fill the registers
            u = first + tl.arange(0, 16)
            inside = u < side.r
            matrix = tl.load(
                side.w1 + h * s1 + u[None, :] * c.K + k[:, None], mask=inside[None, :] & (k < c.K)[:, None], other=0.0
            )
            hidden = tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision=c.PRECISION)
            if side.b1 is not None:
                hidden += tl.load(side.b1 + h * sb + u, mask=inside, other=0.0).to(tl.float32)[None, :]
            weight = tl.load(side.w2 + h * s2 + u, mask=inside, other=0.0).to(tl.float32)
            score += tl.sum(tl.maximum(hidden, 0.0) * weight[None, :], axis=1)
    return score + tl.load(side.b2 + h * sb2).to(tl.float32)


@triton.jit
def load_features(side, b, h, token, keep, k, store, c):
    """(x [C, BK], its factors). A LeaP module is run here, on what was just loaded, and its scores stored."""
    x = load_x(side, b, h, token, keep, k, c)
    p = 0.0
    if side.w2 is not None:
        p = module_score(side, x, h, k, c)
        i = tl.arange(0, c.C)
        first = (b * side.heads + h) * side.tokens + token
        # Masked tokens too: a gradient reads their scores, if only to multiply by 0.
        tl.store(side.score + first + i, p, mask=i < store)
    elif side.score is not None:
        p = load_scalars(side, side.score, b, h, token, keep, c)
    return x, load_factors(side, p, b, h, token, keep, c)


@triton.jit
def load_columns(side, b, h, token, keep, k, store, c):
    """The features of columns, whose factors include the scale of w."""
    x, factors = load_features(side, b, h, token, keep, k, store, c)
    if side.scale is not None:
        factors = times(factors, load_scalars(side, side.scale, b, h, token, keep, c), c)
    return x, factors


@triton.jit
def load_values(side, b, h, token, keep, v, c):
    """w [C, BV] as it lies in memory."""
    i = tl.arange(0, c.C)
    base = side.w + b * side.w_strides[0] + token * side.w_strides[1] + h * side.w_strides[2]
    return tl.load(base + i[:, None] * side.w_strides[1] + v[None, :], mask=tile_mask(keep, v, c.V, c.BV), other=0.0)


@triton.jit
def running_sum(side, decay, b, h, token, left, c):
    """(running sum [C] of a log decay in one chunk, its total), in float64.

    A step is no less than one that leaves exactly 0: what a difference of sums held besides -inf, or -1e30, would be
    lost.
    """
    steps = load_scalars(side, decay, b, h, token, tl.arange(0, c.C) < left, c)
    steps = tl.where(steps < LEAST_STEP, LEAST_STEP, steps).to(tl.float64)  # a NaN stays one
    return tl.cumsum(steps, axis=0), tl.sum(steps, axis=0)


@triton.jit
def load_decays(side, decay, b, h, token, left, REVERSE: tl.constexpr, c):
    """(running sum of the log decay [C] in float64, its total, factor of rows, factor of absorbed columns) in one
    chunk. ``decay`` is one of the side's."""
    running, total = running_sum(side, decay, b, h, token, left, c)
    since, until = tl.exp(running.to(tl.float32)), tl.exp((total - running).to(tl.float32))
    if REVERSE:
        return running, total.to(tl.float32), until, since
    else:
        return running, total.to(tl.float32), since, until
