"""The GPU kernels of ``impl="triton"``. Imported only where they are used: nothing else needs Triton.

Attention and its gradient are one shape of computation, seen from two sides. Rows (side ``a``) meet columns (side ``b``)
in chunks of C tokens; what lies wholly inside a row's sight is read from a running state ``S_r = sum c_br x_b w_b^T``, the rest
is multiplied out under a mask:

    read      y_a  = (x_a x_b^T * sigma * M) w_b + sum_r c_ar x_a S_r          output of queries, gradient of values
    features  dx_a = (w_a w_b^T * sigma * M) x_b + sum_r c_ar w_a S_r^T        gradients of queries and of keys

with sigma_ab = sum_r c_ar c_br. With a = queries the sweep runs forward over keys and w_b is v; with a = keys (REVERSE) it
runs backward over queries and w_b is the gradient of the output. Its division by the normaliser is a factor of the query,
``scale``, and so part of c_b. One more channel of w carries the normaliser: 1 for keys, ``aux`` = -(gradient . output) for
queries. x and w go to the tensor cores as they are; what is multiplied in float32 is rounded once. Sequences are
cut into segments: ``segment_states`` sums each, ``scan_states`` turns sums into states at the segments' starts, and every
program then sweeps over one segment with the state in registers.

Letters: C tokens of a chunk, M tokens of a segment (a multiple of C), R rank, K and V widths, BK and BV their tiles. In the
kernels S is a tuple of R tiles [BK, BV] and z one of R [BK]. In memory states are float32 rows of R K V numbers of kv, then
R K of z.
"""

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


class Side(NamedTuple):
    """Tokens of one side. x and w have strides [batch, token, head] and a dense last axis; None: there is none.

    What has one number for each token is float32 with tokens side by side: ``factors`` [batch, heads or 1, R, token] with
    strides [batch, head]; ``score`` what gives proportions by its sigmoid, in place of factors, ``scale`` a further factor, ``aux`` the channel of the
    normaliser and ``decay`` the log decay, all [batch, head, token]. ``relu`` (1 or None): relu(x) is meant. ``w1``,
    ``b1``, ``w2``, ``b2``: weights of a LeaP module that computes ``score`` and stores it (w2 is None: there is none), with
    ``leap_strides`` from head to head and ``r``. ``mask`` uint8 [batch, token].
    """

    x: Any
    x_strides: Any
    relu: Any
    factors: Any
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
def _locate(span, index):
    """Sequence and segment of a program; sequence ``span.sequences`` means that there is none."""
    if span.cu is None:
        return index // span.segments, index % span.segments
    else:
        return tl.load(span.rows + index), tl.load(span.places + index)


@triton.jit
def _extent(span, n):
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
def _kept(side, b, token, left, C: tl.constexpr):
    """Which of the C tokens from ``token`` on are there: the sequence has ``left`` more, and the mask hides some."""
    i = tl.arange(0, C)
    keep = i < left
    if side.mask is not None:
        keep = keep & (tl.load(side.mask + b * side.tokens + token + i, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _within(keep, columns, width: tl.constexpr, BLOCK: tl.constexpr):
    """The mask [C, columns] of a tile; tiles that divide the width need no look at the columns."""
    if width % BLOCK == 0:
        return keep[:, None]
    else:
        return keep[:, None] & (columns < width)[None, :]


@triton.jit
def _scalars(side, pointer, b, h, token, keep, C: tl.constexpr):
    """float32 numbers [C] of a [batch, head, token] array: tokens lie side by side, so no address is worked out for each."""
    i = tl.arange(0, C)
    return tl.load(pointer + (b * side.heads + h) * side.tokens + token + i, mask=keep, other=0.0)


# ---- features and values ---------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _add_dot(acc, a, b, PRECISION: tl.constexpr):
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
def _cosine_of(score):
    """cos(pi/2 P) of P = sigmoid(score) as sin(pi/2 (1 - P)): never negative, and right where P is rounded to 1."""
    return _sine(tl.sigmoid(-score))


@triton.jit
def _sine_of(score):
    """sin(pi/2 P) of P = sigmoid(score)."""
    return _sine(tl.sigmoid(score))


@triton.jit
def _load_x(side, b, h, token, keep, k, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """x [C, BK], or relu(x), in its own dtype."""
    i = tl.arange(0, C)
    base = side.x + b * side.x_strides[0] + token * side.x_strides[1] + h * side.x_strides[2]
    x = tl.load(base + i[:, None] * side.x_strides[1] + k[None, :], mask=_within(keep, k, K, BK), other=0.0)
    if side.relu is not None:
        relu = tl.where(x.to(tl.float32) < 0, 0.0, x.to(tl.float32))  # a NaN stays one
        x = relu.to(side.x.dtype.element_ty)
    return x


@triton.jit
def _module(side, x, h, k, K: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr):
    """The score [C] of ReLU'd x [C, BK], BK >= K."""
    s1, sb, s2, sb2 = side.leap_strides
    if side.w1 is None:
        weight = tl.load(side.w2 + h * s2 + k, mask=k < K, other=0.0).to(tl.float32)
        score = tl.sum(x.to(tl.float32) * weight[None, :], axis=1)
    else:
        score = tl.zeros([x.shape[0]], tl.float32)
        for first in range(0, BH, 16):  # a few hidden units at a time: all weights at once would fill the registers
            u = first + tl.arange(0, 16)
            inside = u < side.r
            matrix = tl.load(
                side.w1 + h * s1 + u[None, :] * K + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0
            )
            hidden = tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision=PRECISION)
            if side.b1 is not None:
                hidden += tl.load(side.b1 + h * sb + u, mask=inside, other=0.0).to(tl.float32)[None, :]
            weight = tl.load(side.w2 + h * s2 + u, mask=inside, other=0.0).to(tl.float32)
            score += tl.sum(tl.maximum(hidden, 0.0) * weight[None, :], axis=1)
    return score + tl.load(side.b2 + h * sb2).to(tl.float32)


@triton.jit
def _factors(side, p, b, h, token, keep, R: tl.constexpr, C: tl.constexpr):
    """R factors [C], float32: cosine and sine of the proportion that score p gives, or loaded, or 1."""
    i = tl.arange(0, C)
    factors = ()
    for rank in tl.static_range(R):
        if side.score is not None:
            if rank == 0:
                factors = factors + (_cosine_of(p),)
            else:
                factors = factors + (_sine_of(p),)
        elif side.factors is not None:
            base = side.factors + b * side.factor_strides[0] + h * side.factor_strides[1] + rank * side.tokens + token
            factors = factors + (tl.load(base + i, mask=keep, other=0.0),)
        else:
            factors = factors + (tl.zeros([C], tl.float32) + 1.0,)
    return factors


@triton.jit
def _times(factors, by, R: tl.constexpr):
    """Every one of R times ``by``."""
    product = ()
    for rank in tl.static_range(R):
        product = product + (factors[rank] * by,)
    return product


@triton.jit
def _features(
    side, b, h, token, keep, k, K: tl.constexpr, store, R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(x [C, BK], its factors). A LeaP module is run here, on what was just loaded, and its scores stored."""
    x = _load_x(side, b, h, token, keep, k, K, C, BK)
    p = 0.0
    if side.w2 is not None:
        p = _module(side, x, h, k, K, BH, PRECISION)
        i = tl.arange(0, C)
        first = (b * side.heads + h) * side.tokens + token
        # Masked tokens too: a gradient reads their scores, if only to multiply by 0.
        tl.store(side.score + first + i, p, mask=i < store)
    elif side.score is not None:
        p = _scalars(side, side.score, b, h, token, keep, C)
    return x, _factors(side, p, b, h, token, keep, R, C)


@triton.jit
def _columns(
    side, b, h, token, keep, k, K: tl.constexpr, store, R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The features of columns, whose factors include the scale of w."""
    x, factors = _features(side, b, h, token, keep, k, K, store, R, BH, C, BK, PRECISION)
    if side.scale is not None:
        factors = _times(factors, _scalars(side, side.scale, b, h, token, keep, C), R)
    return x, factors


@triton.jit
def _values(side, b, h, token, keep, v, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """w [C, BV] as it lies in memory."""
    i = tl.arange(0, C)
    base = side.w + b * side.w_strides[0] + token * side.w_strides[1] + h * side.w_strides[2]
    return tl.load(base + i[:, None] * side.w_strides[1] + v[None, :], mask=_within(keep, v, V, BV), other=0.0)


@triton.jit
def _decays(side, b, h, token, left, REVERSE: tl.constexpr, C: tl.constexpr):
    """(running sum of the log decay [C], its total, factor of rows, factor of absorbed columns) in one chunk.

    In float64, and a step is no less than one that leaves exactly 0: what a difference of sums held besides -inf, or -1e30,
    would be lost.
    """
    i = tl.arange(0, C)
    steps = _scalars(side, side.decay, b, h, token, i < left, C)
    steps = tl.where(steps < LEAST_STEP, LEAST_STEP, steps).to(tl.float64)  # a NaN stays one
    total = tl.sum(steps, axis=0)
    running = tl.cumsum(steps, axis=0)
    since, until = tl.exp(running.to(tl.float32)), tl.exp((total - running).to(tl.float32))
    if REVERSE:
        return running, total.to(tl.float32), until, since
    else:
        return running, total.to(tl.float32), since, until


@triton.jit
def scores(side, K: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Runs a LeaP module alone, where heads are so wide that a sweep has no registers left for it. Grid: (tokens / C, batch, head)."""
    token, b, h = tl.program_id(0) * C, tl.program_id(1).to(tl.int64), tl.program_id(2)
    k = tl.arange(0, BK)
    left = side.tokens - token
    keep = _kept(side, b, token, left, C)
    p = _module(side, _load_x(side, b, h, token, keep, k, K, C, BK), h, k, K, BH, PRECISION)
    i = tl.arange(0, C)
    tl.store(side.score + (b * side.heads + h) * side.tokens + token + i, p, mask=i < left)


# ---- states ----------------------------------------------------------------------------------------------------------


@triton.jit
def _state_places(k, v, rank, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr):
    """Offsets and masks in a state row of one rank's kv [BK, BV] and z [BK]."""
    row = rank * K + k
    return row[:, None] * V + v[None, :], (k < K)[:, None] & (v < V)[None, :], R * K * V + row, k < K


@triton.jit
def _load_state(row, k, v, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr):
    S = ()
    z = ()
    for rank in tl.static_range(R):
        kv_at, kv_in, z_at, z_in = _state_places(k, v, rank, K, V, R)
        S = S + (tl.load(row + kv_at, mask=kv_in, other=0.0),)
        z = z + (tl.load(row + z_at, mask=z_in, other=0.0),)
    return S, z


@triton.jit
def _zero_state(R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    S = ()
    z = ()
    for _rank in tl.static_range(R):
        S = S + (tl.zeros([BK, BV], tl.float32),)
        z = z + (tl.zeros([BK], tl.float32),)
    return S, z


@triton.jit
def _faded(S, z, factor, R: tl.constexpr):
    """S and z times a number."""
    new_S = ()
    new_z = ()
    for rank in tl.static_range(R):
        new_S = new_S + (S[rank] * factor,)
        new_z = new_z + (z[rank] * factor,)
    return new_S, new_z


@triton.jit
def _added(
    S, z, x, factors, w, side, b, h, token, keep, AUX: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S and z with a chunk of columns more. Keys count as 1 in z, queries as ``aux``."""
    new_S = ()
    new_z = ()
    columns = tl.trans(x.to(DOT))
    for rank in tl.static_range(R):
        if AUX:
            by = factors[rank]
            if side.aux is not None:
                by = by * _scalars(side, side.aux, b, h, token, keep, C)
            new_z = new_z + (z[rank] + tl.sum(x.to(tl.float32) * by[:, None], axis=0),)
        else:
            new_z = new_z + (z[rank],)
        weighted = (w.to(tl.float32) * factors[rank][:, None]).to(DOT)
        new_S = new_S + (_add_dot(S[rank], columns, weighted, PRECISION),)
    return new_S, new_z


@triton.jit
def _sigma(rows, columns, R: tl.constexpr):
    """sum_r c_ar c_br [C, C]."""
    sigma = rows[0][:, None] * columns[0][None, :]
    for rank in tl.static_range(1, R):
        sigma += rows[rank][:, None] * columns[rank][None, :]
    return sigma


@triton.jit
def _absorb_head(
    S, z, side, b, h, token, keep, k, v, K: tl.constexpr, V: tl.constexpr, store, of_columns, AUX: tl.constexpr,
    DECAY: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x, factors = _columns(side, b, h, token, keep, k, K, store, R, BH, C, BK, PRECISION)
    if DECAY:
        factors = _times(factors, of_columns, R)
    w = _values(side, b, h, token, keep, v, V, C, BV)
    return _added(S, z, x, factors, w, side, b, h, token, keep, AUX, R, C, DOT, PRECISION)


@triton.jit
def _absorb(
    S, z, side, b, g, token, left, HEADS: tl.constexpr, keep, k, v, K: tl.constexpr, V: tl.constexpr, store, AUX: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one chunk of columns, of every head that shares the state, to S and z."""
    of_columns = 1.0
    if DECAY:
        running, total, of_rows, of_columns = _decays(side, b, g, token, left, REVERSE, C)
        S, z = _faded(S, z, tl.exp(total), R)
    if HEADS == 1:
        S, z = _absorb_head(S, z, side, b, g, token, keep, k, v, K, V, store, of_columns, AUX, DECAY, R, BH, C, BK, BV, DOT,
                            PRECISION)  # fmt: skip
    else:
        for j in range(HEADS):
            S, z = _absorb_head(S, z, side, b, g * HEADS + j, token, keep, k, v, K, V, store, of_columns, AUX, DECAY, R, BH, C,
                                BK, BV, DOT, PRECISION)  # fmt: skip
    return S, z


@triton.jit
def segment_states(
    side, span, states, totals, groups, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, AUX: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of every segment, as if it began from nothing, into the slots of ``states`` [slots, G, R K (V + 1)].

    Grid: (tiles of V x segments, G). With a decay the log decay of each segment goes to ``totals`` [slots, G].
    """
    tiles = tl.cdiv(V, BV)
    tile = tl.program_id(0) % tiles
    n, place = _locate(span, tl.program_id(0) // tiles)
    g = tl.program_id(1)
    if n < span.sequences:
        b, start, length, segments, slot = _extent(span, n)
        k = tl.arange(0, BK)
        v = tile * BV + tl.arange(0, BV)
        S, z = _zero_state(R, BK, BV)
        first = place * span.segment_tokens
        last = tl.minimum(first + span.segment_tokens, length)
        chunks = tl.cdiv(last - first, C)
        decay = 0.0
        for c in range(chunks):
            if REVERSE:
                at = first + (chunks - 1 - c) * C
            else:
                at = first + c * C
            token = start + at
            keep = _kept(side, b, token, last - at, C)
            store = tl.where(tile == 0, last - at, 0)
            S, z = _absorb(S, z, side, b, g, token, last - at, HEADS, keep, k, v, K, V, store, AUX, DECAY, REVERSE, R, BH, C,
                           BK, BV, DOT, PRECISION)  # fmt: skip
            if DECAY:
                decay += tl.sum(_scalars(side, side.decay, b, g, token, tl.arange(0, C) < last - at, C), axis=0)
        row = states + ((slot + place) * groups + g) * (R * K * (V + 1))
        for rank in tl.static_range(R):
            kv_at, kv_in, z_at, z_in = _state_places(k, v, rank, K, V, R)
            tl.store(row + kv_at, S[rank], mask=kv_in)
            tl.store(row + z_at, z[rank], mask=z_in & (tile == 0))
        if DECAY:
            tl.store(totals + (slot + place) * groups + g, decay, mask=tile == 0)


@triton.jit
def scan_states(
    span, states, totals, kv, z, final_kv, final_z, groups, KV, D, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sums of segments -> the state with which the sweep enters each, in place; the last slot and ``final_*`` get the end.

    ``kv`` and ``z`` (None: nothing) are where the sweep starts from. Grid: (sequences, G, numbers of a row / BLOCK).
    """
    n, g = tl.program_id(0), tl.program_id(1)
    b, start, length, segments, slot = _extent(span, n)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    own = (n.to(tl.int64) * groups + g) * KV
    own_z = (n.to(tl.int64) * groups + g) * (D - KV)
    state = tl.zeros([BLOCK], tl.float32)
    if kv is not None:
        state += tl.load(kv + own + i, mask=i < KV, other=0.0).to(tl.float32)
    if z is not None:
        state += tl.load(z + own_z + (i - KV), mask=(i >= KV) & (i < D), other=0.0).to(tl.float32)
    for s in range(0, segments, AHEAD):
        for ahead in tl.static_range(AHEAD):  # unrolled, so that several loads are under way at once
            there = s + ahead < segments
            if REVERSE:
                place = slot + segments - 1 - (s + ahead)
            else:
                place = slot + s + ahead
            row = states + (place * groups + g) * D + i
            more = tl.load(row, mask=there & (i < D), other=0.0)
            tl.store(row, state, mask=there & (i < D))
            if DECAY:
                state = state * tl.exp(tl.load(totals + place * groups + g, mask=there, other=0.0))
            state += more
    tl.store(states + ((slot + segments) * groups + g) * D + i, state, mask=i < D)
    tl.store(final_kv + own + i, state, mask=i < KV)
    tl.store(final_z + own_z + (i - KV), state, mask=(i >= KV) & (i < D))


# ---- which columns a row sees ----------------------------------------------------------------------------------------


@triton.jit
def _first_seeing(counts, segments, segment_tokens, key):
    """The first segment of queries of which all see the first ``key`` keys."""
    low = segments * 0
    high = segments
    while low < high:
        middle = (low + high) // 2
        if tl.load(counts + middle * segment_tokens) >= key:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _entry(counts, place, first, last, segments, segment_tokens, length, VISIBLE: tl.constexpr, REVERSE: tl.constexpr,
           C: tl.constexpr):  # fmt: skip
    """(slot of the state before the first chunk of rows, chunks of columns that it holds).

    Going backward the second is the first chunk that it holds. ``counts`` points to the sequence's own.
    """
    if VISIBLE == ALL:
        return segments, segments * 0
    elif VISIBLE == CAUSAL:
        return place, place * 0
    else:
        if REVERSE:
            seeing = _first_seeing(counts, segments, segment_tokens, last)
            slot = tl.where(seeing > 0, seeing - 1, segments)
            return slot, tl.minimum(seeing * (segment_tokens // C), tl.cdiv(length, C))
        else:
            seen = tl.load(counts + first).to(tl.int32)
            slot = tl.where(seen >= length, segments, seen // segment_tokens)
            return slot, tl.minimum(slot * (segment_tokens // C), tl.cdiv(length, C))


@triton.jit
def _absorbable(counts, at, last, done, length, REVERSE: tl.constexpr, C: tl.constexpr):
    """Whether all rows of the chunk at ``at`` see (are seen by) all of the next chunk of columns."""
    if REVERSE:
        key_end = tl.minimum(at + C, last)
        more = done > 0
        return more & (tl.load(counts + tl.where(more, done - 1, 0) * C, mask=more, other=0) >= key_end)
    else:
        seen = tl.load(counts + at)
        return (done * C < length) & (tl.minimum(done * C + C, length) <= seen)


@triton.jit
def _overlap(counts, at, last, done, length, REVERSE: tl.constexpr, C: tl.constexpr):
    """(first, end) chunks of columns that some rows of the chunk see (are seen by), beyond those absorbed."""
    if REVERSE:
        first = done
        going = first > 0
        while going:
            query = tl.minimum(first * C, length) - 1
            sees = tl.load(counts + query) > at
            first = tl.where(sees, first - 1, first)
            going = sees & (first > 0)
        return first, done
    else:
        most = tl.load(counts + tl.minimum(at + C, last) - 1).to(tl.int32)
        return done, tl.maximum(tl.cdiv(most, C), done)


@triton.jit
def _between(running, sight, REVERSE: tl.constexpr):
    """The decay [C, C] between a query and a key of the same chunk, from the running sum of its logarithm."""
    between = running[:, None] - running[None, :]
    if REVERSE:
        between = -between
    return tl.exp(tl.where(sight, between, 0.0).to(tl.float32))


@triton.jit
def _sight(counts, at, last, columns_at, length, VISIBLE: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr):
    """bool [C, C]: the row and the column of two overlapping chunks see each other."""
    i = tl.arange(0, C)
    if VISIBLE == CAUSAL:
        if REVERSE:
            return i[:, None] <= i[None, :]
        else:
            return i[:, None] >= i[None, :]
    else:
        if REVERSE:
            seen = tl.load(counts + columns_at + i, mask=columns_at + i < length, other=0)
            return (at + i)[:, None] < seen[None, :]
        else:
            seen = tl.load(counts + at + i, mask=at + i < last, other=0)
            return (columns_at + i)[None, :] < seen[:, None]


# ---- the two sweeps --------------------------------------------------------------------------------------------------


@triton.jit
def _read_chunk(
    y, total, S, z, x, factors, running, of_columns, side, counts, b, h, start, length, at, last, chunk, k, v,
    K: tl.constexpr, V: tl.constexpr, VISIBLE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rows read from one chunk of columns under the mask; a causal sweep also adds it to the state."""
    token = start + chunk * C
    keep = _kept(side, b, token, length - chunk * C, C)
    sight = _sight(counts, at, last, chunk * C, length, VISIBLE, REVERSE, C)
    x_b, factors_b = _columns(side, b, h, token, keep, k, K, 0, R, BH, C, BK, PRECISION)
    w = _values(side, b, h, token, keep, v, V, C, BV)
    if VISIBLE == CAUSAL:  # before the scores, so that less is in registers at once
        faded = factors_b
        if DECAY:
            faded = _times(factors_b, of_columns, R)
        S, z = _added(S, z, x_b, faded, w, side, b, h, token, keep, NORMALIZE, R, C, DOT, PRECISION)
    P = _dot(x.to(DOT), tl.trans(x_b.to(DOT)), PRECISION) * _sigma(factors, factors_b, R)
    P = tl.where(sight, P, 0.0)
    if DECAY:
        P = P * _between(running, sight, REVERSE)
    if NORMALIZE:
        total += tl.sum(P, axis=1)
    y = _add_dot(y, P.to(DOT), w.to(DOT), PRECISION)
    return y, total, S, z


@triton.jit
def read(
    a, b_side, a_span, b_span, states, counts, count_stride, out, out_strides, normaliser, groups, eps, ROW_SHARE: tl.constexpr,
    COLUMN_SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VISIBLE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr,
    R: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows read what they see: outputs (and ``normaliser``) of queries, or, REVERSE, gradients of values.

    ``ROW_SHARE`` rows' heads, ``COLUMN_SHARE`` columns' heads belong to one state head of ``groups``; one of them is 1.
    Grid: (tiles of V x segments of rows, heads of rows).
    """
    tiles = tl.cdiv(V, BV)
    tile = tl.program_id(0) % tiles
    n, place = _locate(a_span, tl.program_id(0) // tiles)
    h = tl.program_id(1)
    if n < a_span.sequences:
        g = h // ROW_SHARE
        b, start, length, _segments, _slot = _extent(a_span, n)
        _b, b_start, b_length, b_segments, slot = _extent(b_span, n)
        k = tl.arange(0, BK)
        v = tile * BV + tl.arange(0, BV)
        i = tl.arange(0, C)
        first = place * a_span.segment_tokens
        last = tl.minimum(first + a_span.segment_tokens, length)
        chunks = tl.cdiv(last - first, C)
        own = counts
        if VISIBLE == COUNTS:
            own = counts + b * count_stride + (b_start if REVERSE else start)
        entry, done = _entry(own, place, first, last, b_segments, b_span.segment_tokens, b_length, VISIBLE, REVERSE, C)
        S, z = _load_state(states + ((slot + entry) * groups + g) * (R * K * (V + 1)), k, v, K, V, R)
        for c in range(chunks):
            if REVERSE:
                at = first + (chunks - 1 - c) * C
            else:
                at = first + c * C
            token = start + at
            keep = _kept(a, b, token, last - at, C)
            store = tl.where(tile == 0, last - at, 0)
            x, factors = _features(a, b, h, token, keep, k, K, store, R, BH, C, BK, PRECISION)
            if VISIBLE == COUNTS:
                while _absorbable(own, at, last, done, b_length, REVERSE, C):
                    if REVERSE:
                        done -= 1
                    left = b_length - done * C
                    kept = _kept(b_side, b, b_start + done * C, left, C)
                    S, z = _absorb(S, z, b_side, b, g, b_start + done * C, left, COLUMN_SHARE, kept, k, v, K, V, 0,
                                   NORMALIZE, False, REVERSE, R, BH, C, BK, BV, DOT, PRECISION)  # fmt: skip
                    if not REVERSE:
                        done += 1
            total = tl.zeros([C], tl.float32)
            y = tl.zeros([C, BV], tl.float32)
            for rank in tl.static_range(R):
                y += _dot(x.to(DOT), S[rank].to(DOT), PRECISION) * factors[rank][:, None]
                if NORMALIZE:
                    total += tl.sum(x.to(tl.float32) * z[rank][None, :], axis=1) * factors[rank]
            running = tl.zeros([C], tl.float32)
            of_columns = running
            if DECAY:
                running, whole, of_rows, of_columns = _decays(a, b, h, token, last - at, REVERSE, C)
                y = y * of_rows[:, None]
                total = total * of_rows
                S, z = _faded(S, z, tl.exp(whole), R)
            if VISIBLE == CAUSAL and COLUMN_SHARE == 1:
                # Straight code, not a loop of one turn: the loop over chunks is then the innermost and its loads overlap.
                y, total, S, z = _read_chunk(
                    y, total, S, z, x, factors, running, of_columns, b_side, own, b, g, b_start, b_length, at, last, at // C,
                    k, v, K, V, VISIBLE, REVERSE, NORMALIZE, DECAY, R, BH, C, BK, BV, DOT, PRECISION,
                )  # fmt: skip
            elif VISIBLE != ALL:
                low, high = at // C, at // C + 1
                if VISIBLE == COUNTS:
                    low, high = _overlap(own, at, last, done, b_length, REVERSE, C)
                for chunk in range(low, high):
                    for j in range(COLUMN_SHARE):
                        y, total, S, z = _read_chunk(
                            y, total, S, z, x, factors, running, of_columns, b_side, own, b, g * COLUMN_SHARE + j, b_start,
                            b_length, at, last, chunk, k, v, K, V, VISIBLE, REVERSE, NORMALIZE, DECAY, R, BH, C, BK, BV, DOT,
                            PRECISION,
                        )  # fmt: skip
            if NORMALIZE:
                y = y / tl.maximum(total, eps)[:, None]
                where = (b * a.heads + h) * a.tokens + token + i
                tl.store(normaliser + where, total, mask=(i < last - at) & (tile == 0))
            else:
                y = tl.where(keep[:, None], y, 0.0)
            base = out + b * out_strides[0] + token * out_strides[1] + h * out_strides[2]
            inside = (i < last - at)[:, None] & (v < V)[None, :]
            tl.store(base + i[:, None] * out_strides[1] + v[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _features_chunk(
    parts, S, z, w, row_aux, running, of_columns, side, counts, b, h, start, length, at, last,
    chunk, k, v, K: tl.constexpr, V: tl.constexpr, VISIBLE: tl.constexpr, REVERSE: tl.constexpr, AUX: tl.constexpr,
    DECAY: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk of columns adds to the gradients of rows, under the mask; a causal sweep also adds it to the state."""
    token = start + chunk * C
    keep = _kept(side, b, token, length - chunk * C, C)
    sight = _sight(counts, at, last, chunk * C, length, VISIBLE, REVERSE, C)
    x_b, factors_b = _columns(side, b, h, token, keep, k, K, 0, R, 16, C, BK, PRECISION)
    w_b = _values(side, b, h, token, keep, v, V, C, BV)
    if VISIBLE == CAUSAL:
        faded = factors_b
        if DECAY:
            faded = _times(factors_b, of_columns, R)
        S, z = _added(S, z, x_b, faded, w_b, side, b, h, token, keep, AUX, R, C, DOT, PRECISION)
    dP = _dot(w.to(DOT), tl.trans(w_b.to(DOT)), PRECISION)
    if AUX:
        if REVERSE:
            dP += _scalars(side, side.aux, b, h, token, keep, C)[None, :]
        else:
            dP += row_aux[:, None]
    dP = tl.where(sight, dP, 0.0)
    if DECAY:
        dP = dP * _between(running, sight, REVERSE)
    new_parts = ()
    for rank in tl.static_range(R):
        weighted = (dP * factors_b[rank][None, :]).to(DOT)
        new_parts = new_parts + (_add_dot(parts[rank], weighted, x_b.to(DOT), PRECISION),)
    return new_parts, S, z


@triton.jit
def feature_gradients(
    a, b_side, a_span, b_span, states, counts, count_stride, dx, dx_strides, dfactors, row_sums, groups,
    ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VISIBLE: tl.constexpr, REVERSE: tl.constexpr, ROW_AUX: tl.constexpr, COLUMN_AUX: tl.constexpr,
    DECAY: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, or, REVERSE, of keys: of x, and per tile of K of factors (or of the proportion).

    ``dfactors`` [tiles, batch, head, R, token] (or without R); with a decay ``row_sums`` [tiles, batch, head, token] gets
    x . dx. The normaliser's channel is ``aux`` of the queries and 1 of the keys. BV holds all of V.
    Grid: (tiles of K x segments of rows, heads of rows).
    """
    tiles = tl.cdiv(K, BK)
    tile = tl.program_id(0) % tiles
    n, place = _locate(a_span, tl.program_id(0) // tiles)
    h = tl.program_id(1)
    if n < a_span.sequences:
        g = h // ROW_SHARE
        b, start, length, _segments, _slot = _extent(a_span, n)
        _b, b_start, b_length, b_segments, slot = _extent(b_span, n)
        k = tile * BK + tl.arange(0, BK)
        v = tl.arange(0, BV)
        first = place * a_span.segment_tokens
        last = tl.minimum(first + a_span.segment_tokens, length)
        chunks = tl.cdiv(last - first, C)
        own = counts
        if VISIBLE == COUNTS:
            own = counts + b * count_stride + (b_start if REVERSE else start)
        entry, done = _entry(own, place, first, last, b_segments, b_span.segment_tokens, b_length, VISIBLE, REVERSE, C)
        S, z = _load_state(states + ((slot + entry) * groups + g) * (R * K * (V + 1)), k, v, K, V, R)
        for c in range(chunks):
            if REVERSE:
                at = first + (chunks - 1 - c) * C
            else:
                at = first + c * C
            token = start + at
            keep = _kept(a, b, token, last - at, C)
            w = _values(a, b, h, token, keep, v, V, C, BV)
            if VISIBLE == COUNTS:
                while _absorbable(own, at, last, done, b_length, REVERSE, C):
                    if REVERSE:
                        done -= 1
                    left = b_length - done * C
                    kept = _kept(b_side, b, b_start + done * C, left, C)
                    S, z = _absorb(S, z, b_side, b, g, b_start + done * C, left, COLUMN_SHARE, kept, k, v, K, V, 0,
                                   COLUMN_AUX, False, REVERSE, R, 16, C, BK, BV, DOT, PRECISION)  # fmt: skip
                    if not REVERSE:
                        done += 1
            row_aux = tl.zeros([C], tl.float32) + 1.0
            if ROW_AUX and not REVERSE:
                row_aux = _scalars(a, a.aux, b, h, token, keep, C)
            parts = ()
            for rank in tl.static_range(R):
                part = _dot(w.to(DOT), tl.trans(S[rank].to(DOT)), PRECISION)
                if ROW_AUX:
                    part += row_aux[:, None] * z[rank][None, :]
                parts = parts + (part,)
            running = tl.zeros([C], tl.float32)
            of_columns = running
            if DECAY:
                running, whole, of_rows, of_columns = _decays(a, b, h, token, last - at, REVERSE, C)
                parts = _times(parts, of_rows[:, None], R)
                S, z = _faded(S, z, tl.exp(whole), R)
            if VISIBLE == CAUSAL and COLUMN_SHARE == 1:
                parts, S, z = _features_chunk(
                    parts, S, z, w, row_aux, running, of_columns, b_side, own, b, g, b_start,
                    b_length, at, last, at // C, k, v, K, V, VISIBLE, REVERSE, COLUMN_AUX, DECAY, R, C, BK, BV, DOT,
                    PRECISION,
                )  # fmt: skip
            elif VISIBLE != ALL:
                low, high = at // C, at // C + 1
                if VISIBLE == COUNTS:
                    low, high = _overlap(own, at, last, done, b_length, REVERSE, C)
                for chunk in range(low, high):
                    for j in range(COLUMN_SHARE):
                        parts, S, z = _features_chunk(
                            parts, S, z, w, row_aux, running, of_columns, b_side, own, b,
                            g * COLUMN_SHARE + j, b_start, b_length, at, last, chunk, k, v, K, V, VISIBLE, REVERSE,
                            COLUMN_AUX, DECAY, R, C, BK, BV, DOT, PRECISION,
                        )  # fmt: skip
            x, factors = _columns(a, b, h, token, keep, k, K, 0, R, 16, C, BK, PRECISION)
            gradient = parts[0] * factors[0][:, None]
            for rank in tl.static_range(1, R):
                gradient += parts[rank] * factors[rank][:, None]
            of_factors = ()
            for rank in tl.static_range(R):
                of_factor = tl.sum(parts[rank] * x.to(tl.float32), axis=1)
                if a.scale is not None:
                    of_factor = of_factor * _scalars(a, a.scale, b, h, token, keep, C)
                of_factors = of_factors + (of_factor,)
            _write_feature_gradients(a, x, gradient, of_factors, b, h, token, keep, last - at, k, K, tile, dx, dx_strides,
                                     dfactors, row_sums, a_span, DECAY, R, C, BK)  # fmt: skip


@triton.jit
def _write_feature_gradients(
    side, x, gradient, of_factors, b, h, token, keep, left, k, K: tl.constexpr, tile, dx, dx_strides, dfactors, row_sums,
    span, DECAY: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x [C, BK] and of its factors or its proportion; hidden tokens get 0."""
    i = tl.arange(0, C)
    gradient = tl.where(keep[:, None], gradient, 0.0)
    plane = tile * span.sequences + b if span.cu is None else tile + b
    row = (plane * side.heads + h) * side.tokens
    place = row + token + i
    if side.score is not None:
        p = _scalars(side, side.score, b, h, token, keep, C)
        turn = of_factors[1] * _cosine_of(p) - of_factors[0] * _sine_of(p)
        tl.store(dfactors + place, tl.where(keep, turn * 1.5707963267948966, 0.0), mask=i < left)
    elif side.factors is not None:
        for rank in tl.static_range(R):
            tl.store(
                dfactors + row * R + rank * side.tokens + token + i,
                tl.where(keep, of_factors[rank], 0.0),
                mask=i < left,
            )
    if side.relu is not None:
        gradient = tl.where(x.to(tl.float32) > 0, gradient, 0.0)
    if DECAY:
        tl.store(row_sums + place, tl.sum(gradient * x.to(tl.float32), axis=1), mask=i < left)
    base = dx + b * dx_strides[0] + token * dx_strides[1] + h * dx_strides[2]
    tl.store(base + i[:, None] * dx_strides[1] + k[None, :], gradient.to(dx.dtype.element_ty),
             mask=_within(i < left, k, K, BK))  # fmt: skip


# ---- before and after the sweeps -------------------------------------------------------------------------------------


@triton.jit
def numerator_gradients(
    grad, grad_strides, output, output_strides, normaliser, scale, aux, tokens, heads, rows, eps, V, BLOCK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """scale = 1 / max(normaliser, eps) and aux = -(grad . output), 0 where it was clamped. Grid: (rows / BLOCK)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    t, h, b = i % tokens, (i // tokens) % heads, i // tokens // heads
    v = tl.arange(0, BV)
    keep = inside[:, None] & (v < V)[None, :]
    at = (b * grad_strides[0] + t * grad_strides[1] + h * grad_strides[2])[:, None] + v[None, :]
    g = tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
    at = (b * output_strides[0] + t * output_strides[1] + h * output_strides[2])[:, None] + v[None, :]
    o = tl.load(output + at, mask=keep, other=0.0).to(tl.float32)
    total = tl.load(normaliser + i, mask=inside, other=1.0)
    tl.store(scale + i, 1.0 / tl.maximum(total, eps), mask=inside)
    tl.store(aux + i, tl.where(total >= eps, -tl.sum(g * o, axis=1), 0.0), mask=inside)


@triton.jit
def decay_gradients(
    span, forward_states, reverse_states, query_sums, key_sums, gradient, tokens, groups, q_tiles, k_tiles, D,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient [batch, head, token] of log_decay.

    In the running sum from a segment's start, every term with phi_q(t) has a factor exp(+sum_t), every term with phi_k(t)
    exp(-sum_t), and the state behind the segment exp(+sum at its end). Grid: (segments, H).
    """
    n, place = _locate(span, tl.program_id(0))
    h = tl.program_id(1)
    if n < span.sequences:
        b, start, length, segments, slot = _extent(span, n)
        after = ((slot + place + 1) * groups + h) * D
        behind = ((slot + place) * groups + h) * D
        later = tl.zeros([BLOCK], tl.float32)
        for d in range(0, D, BLOCK):
            i = d + tl.arange(0, BLOCK)
            later += tl.load(forward_states + after + i, mask=i < D, other=0.0) * tl.load(
                reverse_states + behind + i, mask=i < D, other=0.0
            )
        carried = tl.sum(later, axis=0)
        first = place * span.segment_tokens
        last = tl.minimum(first + span.segment_tokens, length)
        chunks = tl.cdiv(last - first, C)
        plane = tokens.to(tl.int64) * groups
        if span.cu is None:
            plane = plane * span.sequences
        for c in range(chunks):
            at = first + (chunks - 1 - c) * C
            i = tl.arange(0, C)
            inside = i < last - at
            where = (b * groups + h) * tokens + start + at + i
            steps = tl.zeros([C], tl.float32)
            for tile in range(q_tiles):
                steps += tl.load(query_sums + tile * plane + where, mask=inside, other=0.0)
            for tile in range(k_tiles):
                steps -= tl.load(key_sums + tile * plane + where, mask=inside, other=0.0)
            total = tl.sum(steps, axis=0)
            tl.store(gradient + where, carried + total - tl.cumsum(steps, axis=0) + steps, mask=inside)
            carried += total


@triton.jit
def leap_gradients(
    x, x_strides, score, dp, dx, dx_strides, mask, weights, partial, tokens, heads, rows, K, W,
    per_head: tl.constexpr, r: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through one LeaP module: adds to dx [batch, token, head, K], and sums each program's gradients of the weights.

    ``partial`` [programs, heads or 1, W] with W = r K + r + r + 1 numbers w1, b1, w2, b2 (K + 1 without a hidden layer).
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


# ---- one token -------------------------------------------------------------------------------------------------------


@triton.jit
def step(
    q, k_side, kv, z, new_kv, new_z, out, out_strides, groups, share, eps, K: tl.constexpr, V: tl.constexpr, NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: its key is added to the state, and its query reads it. Grid: (batch, G).

    ``new_kv`` and ``new_z`` may be ``kv`` and ``z`` (None: there is no past) themselves.

    The features are kept as vectors: a product with one row is no work for tensor cores.
    """
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, BK)
    keep = _kept(k_side, b, 0, 1, 1)
    x, factors = _one_token(k_side, b, g, keep, k, K, R, BH, BK)
    fade = 1.0
    if DECAY:
        fade = tl.exp(tl.load(k_side.decay + b * groups + g))
    place = b * groups + g
    sums = ()
    for rank in tl.static_range(R):
        at = place * (R * K) + rank * K + k
        added = x * tl.sum(factors[rank], axis=0)
        if z is not None:
            added += tl.load(z + at, mask=k < K, other=0.0) * fade
        tl.store(new_z + at, added, mask=k < K)
        sums = sums + (added,)
    for tile in range(tl.cdiv(V, BV)):
        v = tile * BV + tl.arange(0, BV)
        w = tl.reshape(_values(k_side, b, g, 0, keep, v, V, 1, BV).to(tl.float32), [BV])
        S = ()
        for rank in tl.static_range(R):
            kv_at, kv_in, _z_at, _z_in = _state_places(k, v, rank, K, V, R)
            row = place * (R * K * V)
            new = (x * tl.sum(factors[rank], axis=0))[:, None] * w[None, :]
            if kv is not None:
                new += tl.load(kv + row + kv_at, mask=kv_in, other=0.0) * fade
            tl.store(new_kv + row + kv_at, new, mask=kv_in)
            S = S + (new,)
        for j in range(share):
            h = g * share + j
            x_q, factors_q = _one_token(q, b, h, _kept(q, b, 0, 1, 1), k, K, R, BH, BK)
            y = tl.zeros([BV], tl.float32)
            total = 0.0
            for rank in tl.static_range(R):
                query = x_q * tl.sum(factors_q[rank], axis=0)
                y += tl.sum(query[:, None] * S[rank], axis=0)
                total += tl.sum(query * sums[rank], axis=0)
            if NORMALIZE:
                y = y / tl.maximum(total, eps)
            base = out + b * out_strides[0] + h * out_strides[2]
            tl.store(base + v, y.to(out.dtype.element_ty), mask=v < V)


@triton.jit
def _one_token(side, b, h, keep, k, K: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """(x [BK] in float32, R factors [1]) of the only token; a LeaP module is run on it."""
    x = _load_x(side, b, h, 0, keep, k, K, 1, BK).to(tl.float32)
    p = 0.0
    if side.w2 is not None:
        s1, sb, s2, sb2 = side.leap_strides
        if side.w1 is None:
            weight = tl.load(side.w2 + h * s2 + k, mask=k < K, other=0.0).to(tl.float32)
            score = tl.sum(x * weight[None, :], axis=1)
        else:
            u = tl.arange(0, BH)
            matrix = tl.load(
                side.w1 + h * s1 + u[:, None] * K + k[None, :], mask=(u < side.r)[:, None] & (k < K)[None, :], other=0.0
            )
            hidden = tl.sum(matrix.to(tl.float32) * x, axis=1)
            if side.b1 is not None:
                hidden += tl.load(side.b1 + h * sb + u, mask=u < side.r, other=0.0).to(tl.float32)
            weight = tl.load(side.w2 + h * s2 + u, mask=u < side.r, other=0.0).to(tl.float32)
            score = tl.zeros([1], tl.float32) + tl.sum(tl.maximum(hidden, 0.0) * weight, axis=0)
        p = score + tl.load(side.b2 + h * sb2).to(tl.float32)
    elif side.score is not None:
        p = _scalars(side, side.score, b, h, 0, keep, 1)
    return tl.reshape(x, [BK]), _factors(side, p, b, h, 0, keep, R, 1)
