"""The two sweeps of ``impl="triton"``, and with them the shape of all its kernels.

Attention and its gradient are one shape of computation, seen from two sides. Rows (side ``a``) meet columns (side
``b``) in chunks of C tokens; what lies wholly inside a row's sight is read from a running state ``S_r = sum c_br x_b
w_b^T``, the rest is multiplied out under a mask:

    read      y_a  = (x_a x_b^T * sigma * M) w_b + sum_r c_ar x_a S_r          output of queries, gradient of values
    features  dx_a = (w_a w_b^T * sigma * M) x_b + sum_r c_ar w_a S_r^T        gradients of queries and of keys

with sigma_ab = sum_r c_ar c_br. With a = queries the sweep runs forward over keys and w_b is v; with a = keys (REVERSE)
it runs backward over queries and w_b is the gradient of the output. Its division by the normaliser is a factor of the
query, ``scale``, and so part of c_b. One more channel of w carries the normaliser: 1 for keys, ``aux`` = -(gradient .
output) for queries. x and w go to the tensor cores as they are; what is multiplied in float32 is rounded once.
Sequences are cut into segments: ``segment_states`` sums each, ``scan_states`` turns sums into states at the segments'
starts, and every program then sweeps over one segment with the state in registers.

Where later keys are seen too (``later``, a second decay) a chunk of rows meets its columns in both directions at once;
what lies outside it in the other direction is read before, by sweeps of their own against the direction of the main
ones, and left in memory as float32. Keys then have states that run backward, and queries states
that run forward. ``later`` holds the step before each token, so that a sum over j < s <= i says what lies between two
tokens, as that of ``decay`` does with the two sides turned round.

Letters: C tokens of a chunk, M tokens of a segment (a multiple of C), R rank, K and V widths, BK and BV their tiles. In
the kernels S is a tuple of R tiles [BK, BV] and z one of R [BK]. In memory states are float32 rows of R K V numbers of
kv, then R K of z.
"""

# Triton compiles this, and not all of it is Python to a type checker.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from leapformer.ops.triton.loading import (
    ALL,
    CAUSAL,
    COUNTS,
    LEAST_STEP,
    add_dot,
    cosine_of,
    dot,
    extent_of,
    kept_tokens,
    load_columns,
    load_decays,
    load_factors,
    load_features,
    load_scalars,
    load_values,
    locate,
    running_sum,
    sine_of,
    tile_mask,
    times,
)  # fmt: skip
from leapformer.ops.triton.states import absorb, add_columns, fade, load_state

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
def _differences(running, REVERSE: tl.constexpr):
    """The log decay [C, C] between a query and a key of the same chunk, from its running sum in float64."""
    if REVERSE:
        return (running[None, :] - running[:, None]).to(tl.float32)
    else:
        return (running[:, None] - running[None, :]).to(tl.float32)


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
            seen = tl.load(counts + columns_at + i, mask=i + columns_at < length, other=0)
            return (at + i)[:, None] < seen[None, :]
        else:
            seen = tl.load(counts + at + i, mask=at + i < last, other=0)
            return (i + columns_at)[None, :] < seen[:, None]


# ---- what both sweeps do ---------------------------------------------------------------------------------------------


@triton.jit
def _sigma(rows, columns, c):
    """sum_r c_ar c_br [C, C]."""
    sigma = rows[0][:, None] * columns[0][None, :]
    for rank in tl.static_range(1, c.R):
        sigma += rows[rank][:, None] * columns[rank][None, :]
    return sigma


@triton.jit
def _rows_and_columns(a_span, b_span, n, place):
    """(b, first token of the sequence, first and end of the segment) of a program's rows, and (first token, length,
    segments, first slot) of the columns of sequence n."""
    b, start, length, _segments, _slot = extent_of(a_span, n)
    _b, b_start, b_length, b_segments, slot = extent_of(b_span, n)
    first = place * a_span.segment_tokens
    return b, start, first, tl.minimum(first + a_span.segment_tokens, length), b_start, b_length, b_segments, slot


@triton.jit
def _absorb_seen(
    done, S, z, side, counts, b, g, start, length, at, last, HEADS: tl.constexpr, k, v, AUX: tl.constexpr,
    REVERSE: tl.constexpr, c,
):  # fmt: skip
    """S and z with all chunks of columns that the chunk of rows at ``at`` sees whole, and before them which these
    are."""
    while _absorbable(counts, at, last, done, length, REVERSE, c.C):
        if REVERSE:
            done -= 1
        left = length - done * c.C
        keep = kept_tokens(side, b, start + done * c.C, left, c)
        S, z = absorb(S, z, side, b, g, start + done * c.C, left, HEADS, keep, k, v, 0, AUX, False, REVERSE, c)
        if not REVERSE:
            done += 1
    return done, S, z


@triton.jit
def _meet(
    S, z, of_columns, side, counts, b, h, start, length, at, last, chunk, k, v, VISIBLE: tl.constexpr,
    REVERSE: tl.constexpr, AUX: tl.constexpr, DECAY: tl.constexpr, c,
):  # fmt: skip
    """A chunk of columns that rows see under a mask: (token, keep, mask, x, factors, w), and S and z, to which a causal
    sweep adds it."""
    token = start + chunk * c.C
    keep = kept_tokens(side, b, token, length - chunk * c.C, c)
    sight = _sight(counts, at, last, chunk * c.C, length, VISIBLE, REVERSE, c.C)
    x, factors = load_columns(side, b, h, token, keep, k, 0, c)
    w = load_values(side, b, h, token, keep, v, c)
    if VISIBLE == CAUSAL:  # before the scores, so that less is in registers at once
        faded = factors
        if DECAY:
            faded = times(factors, of_columns, c)
        S, z = add_columns(S, z, x, faded, w, side, b, h, token, keep, AUX, c)
    return token, keep, sight, x, factors, w, S, z


@triton.jit
def _masked(scores, sight, running, later, REVERSE: tl.constexpr, DECAY: tl.constexpr, LATER: tl.constexpr):
    """Scores [C, C] of what sees each other, times the decay between; 0 elsewhere. LATER: elsewhere the other decay, of
    which ``later`` is the running sum."""
    if LATER:
        between = tl.where(sight, _differences(running, REVERSE), -_differences(later, REVERSE))
        return scores * tl.exp(between)
    else:
        scores = tl.where(sight, scores, 0.0)
        if DECAY:
            scores = scores * tl.exp(tl.where(sight, _differences(running, REVERSE), 0.0))
        return scores


@triton.jit
def _chunks_to_meet(counts, at, last, done, length, VISIBLE: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr):
    """(first, end) chunks of columns that the chunk of rows at ``at`` meets under a mask."""
    low, high = at // C, at // C + 1
    if VISIBLE == COUNTS:
        low, high = _overlap(counts, at, last, done, length, REVERSE, C)
    return low, high


# ---- the two sweeps --------------------------------------------------------------------------------------------------


@triton.jit
def _read_state(x, factors, S, z, NORMALIZE: tl.constexpr, c):
    """What rows read from the state: (y [C, BV], the normaliser [C])."""
    total = tl.zeros([c.C], tl.float32)
    y = tl.zeros([c.C, c.BV], tl.float32)
    for rank in tl.static_range(c.R):
        y += dot(x.to(c.DOT), S[rank].to(c.DOT), c) * factors[rank][:, None]
        if NORMALIZE:
            total += tl.sum(x.to(tl.float32) * z[rank][None, :], axis=1) * factors[rank]
    return y, total


@triton.jit
def _read_chunk(
    y, total, S, z, x, factors, running, later, of_columns, side, counts, b, h, start, length, at, last, chunk, k, v,
    VISIBLE: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, c,
):  # fmt: skip
    """What rows read from one chunk of columns under the mask; a causal sweep also adds it to the state."""
    _token, _keep, sight, x_b, factors_b, w, S, z = _meet(
        S,
        z,
        of_columns,
        side,
        counts,
        b,
        h,
        start,
        length,
        at,
        last,
        chunk,
        k,
        v,
        VISIBLE,
        REVERSE,
        NORMALIZE,
        DECAY,
        c,
    )
    P = dot(x.to(c.DOT), tl.trans(x_b.to(c.DOT)), c) * _sigma(factors, factors_b, c)
    P = _masked(P, sight, running, later, REVERSE, DECAY, side.later is not None)
    if NORMALIZE:
        total += tl.sum(P, axis=1)
    y = add_dot(y, P.to(c.DOT), w.to(c.DOT), c)
    return y, total, S, z


@triton.jit
def _absorb_against(S, z, whole, of_columns, side, b, h, token, left, k, v, AUX: tl.constexpr, c):
    """S and z with one chunk of columns more, in the direction against the main sweep."""
    keep = kept_tokens(side, b, token, left, c)
    x, factors = load_columns(side, b, h, token, keep, k, 0, c)
    w = load_values(side, b, h, token, keep, v, c)
    S, z = fade(S, z, tl.exp(whole), c)
    return add_columns(S, z, x, times(factors, of_columns, c), w, side, b, h, token, keep, AUX, c)


@triton.jit
def read_against(
    a, b_side, span, states, part, part_strides, totals, groups, c, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr
):
    """Before ``read``: rows read what lies outside their chunk against its direction, REVERSE or not, into ``part``
    (float32) [batch, token, head, V] and ``totals`` [tiles, batch, head, token].

    Grid: as of ``read``. Both sides have as many heads as states.
    """
    tiles = tl.cdiv(c.V, c.BV)
    tile = tl.program_id(0) % tiles
    n, place = locate(span, tl.program_id(0) // tiles)
    h = tl.program_id(1)
    if n < span.sequences:
        b, start, first, last, _b_start, _length, _segments, slot = _rows_and_columns(span, span, n, place)
        k = tl.arange(0, c.BK)
        v = tile * c.BV + tl.arange(0, c.BV)
        i = tl.arange(0, c.C)
        S, z = load_state(states + ((slot + place) * groups + h) * (c.R * c.K * (c.V + 1)), k, v, c)
        chunks = tl.cdiv(last - first, c.C)
        for turn in range(chunks):
            at = first + (turn if REVERSE else (chunks - 1 - turn)) * c.C
            token = start + at
            keep = kept_tokens(a, b, token, last - at, c)
            x, factors = load_features(a, b, h, token, keep, k, 0, c)
            y, total = _read_state(x, factors, S, z, NORMALIZE, c)
            _running, whole, of_rows, of_columns = load_decays(a, a.later, b, h, token, last - at, not REVERSE, c)
            base = part + b * part_strides[0] + token * part_strides[1] + h * part_strides[2]
            inside = (i < last - at)[:, None] & (v < c.V)[None, :]
            tl.store(base + i[:, None] * part_strides[1] + v[None, :], y * of_rows[:, None], mask=inside)
            if NORMALIZE:
                where = _plane_row(a, span, tile, b, h) + token + i
                tl.store(totals + where, total * of_rows, mask=i < last - at)
            S, z = _absorb_against(S, z, whole, of_columns, b_side, b, h, token, last - at, k, v, NORMALIZE, c)


@triton.jit
def read(
    a, b_side, a_span, b_span, states, counts, count_stride, out, out_strides, normaliser, part, part_totals, groups,
    eps, c, ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr, VISIBLE: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Rows read what they see: outputs (and ``normaliser``) of queries, or, REVERSE, gradients of values.

    ``ROW_SHARE`` rows' heads, ``COLUMN_SHARE`` columns' heads belong to one state head of ``groups``; one of them is 1.
    ``part`` and ``part_totals`` are what ``read_against`` has left, or None.
    Grid: (tiles of V x segments of rows, heads of rows).
    """
    tiles = tl.cdiv(c.V, c.BV)
    tile = tl.program_id(0) % tiles
    n, place = locate(a_span, tl.program_id(0) // tiles)
    h = tl.program_id(1)
    if n < a_span.sequences:
        g = h // ROW_SHARE
        b, start, first, last, b_start, b_length, b_segments, slot = _rows_and_columns(a_span, b_span, n, place)
        k = tl.arange(0, c.BK)
        v = tile * c.BV + tl.arange(0, c.BV)
        i = tl.arange(0, c.C)
        chunks = tl.cdiv(last - first, c.C)
        own = counts  # of this sequence
        if VISIBLE == COUNTS:
            own = counts + b * count_stride + (b_start if REVERSE else start)
        entry, done = _entry(
            own, place, first, last, b_segments, b_span.segment_tokens, b_length, VISIBLE, REVERSE, c.C
        )
        S, z = load_state(states + ((slot + entry) * groups + g) * (c.R * c.K * (c.V + 1)), k, v, c)
        for turn in range(chunks):
            at = first + ((chunks - 1 - turn) if REVERSE else turn) * c.C
            token = start + at
            keep = kept_tokens(a, b, token, last - at, c)
            store = tl.where(tile == 0, last - at, 0)
            x, factors = load_features(a, b, h, token, keep, k, store, c)
            if VISIBLE == COUNTS:
                done, S, z = _absorb_seen(
                    done,
                    S,
                    z,
                    b_side,
                    own,
                    b,
                    g,
                    b_start,
                    b_length,
                    at,
                    last,
                    COLUMN_SHARE,
                    k,
                    v,
                    NORMALIZE,
                    REVERSE,
                    c,
                )
            y, total = _read_state(x, factors, S, z, NORMALIZE, c)
            running = tl.zeros([c.C], tl.float32)
            of_columns = running
            if DECAY:
                running, whole, of_rows, of_columns = load_decays(a, a.decay, b, h, token, last - at, REVERSE, c)
                y = y * of_rows[:, None]
                total = total * of_rows
                S, z = fade(S, z, tl.exp(whole), c)
            if VISIBLE == CAUSAL and COLUMN_SHARE == 1:
                # Straight code, not a loop of one turn: the loop over chunks is then the innermost and its loads
                # overlap.
                later = running
                if a.later is not None:
                    later, _total = running_sum(a, a.later, b, h, token, last - at, c)
                y, total, S, z = _read_chunk(
                    y, total, S, z, x, factors, running, later, of_columns, b_side, own, b, g, b_start, b_length, at,
                    last, at // c.C, k, v, VISIBLE, REVERSE, NORMALIZE, DECAY, c,
                )  # fmt: skip
            elif VISIBLE != ALL:
                low, high = _chunks_to_meet(own, at, last, done, b_length, VISIBLE, REVERSE, c.C)
                for chunk in range(low, high):
                    for j in range(COLUMN_SHARE):
                        y, total, S, z = _read_chunk(
                            y, total, S, z, x, factors, running, running, of_columns, b_side, own, b,
                            g * COLUMN_SHARE + j, b_start, b_length, at, last, chunk, k, v, VISIBLE, REVERSE,
                            NORMALIZE, DECAY, c,
                        )  # fmt: skip
            offset = b * out_strides[0] + token * out_strides[1] + h * out_strides[2]
            places = offset + i[:, None] * out_strides[1] + v[None, :]
            inside = (i < last - at)[:, None] & (v < c.V)[None, :]
            if part is not None:
                y += tl.load(part + places, mask=inside, other=0.0)
                if NORMALIZE:
                    before = part_totals + _plane_row(a, a_span, tile, b, h) + token + i
                    total += tl.load(before, mask=i < last - at, other=0.0)
            if NORMALIZE:
                y = y / tl.maximum(total, eps)[:, None]
                where = (b * a.heads + h) * a.tokens + token + i
                tl.store(normaliser + where, total, mask=(i < last - at) & (tile == 0))
            else:
                y = tl.where(keep[:, None], y, 0.0)
            tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _plane_row(side, span, tile, b, h):
    """Where the tokens of one head begin in a [tiles, batch, head, token] array."""
    plane = tile * span.sequences + b if span.cu is None else tile + b
    return (plane * side.heads + h) * side.tokens


@triton.jit
def _features_of_state(w, row_aux, S, z, AUX: tl.constexpr, c):
    """The gradients [C, BK] of rows' R features from what they read in the state."""
    parts = ()
    for rank in tl.static_range(c.R):
        part = dot(w.to(c.DOT), tl.trans(S[rank].to(c.DOT)), c)
        if AUX:
            part += row_aux[:, None] * z[rank][None, :]
        parts = parts + (part,)
    return parts


@triton.jit
def _features_chunk(
    parts, S, z, w, row_aux, running, later, of_columns, side, counts, b, h, start, length, at, last, chunk, k, v,
    VISIBLE: tl.constexpr, REVERSE: tl.constexpr, AUX: tl.constexpr, DECAY: tl.constexpr, c,
):  # fmt: skip
    """What one chunk of columns adds to the gradients of rows, under the mask; a causal sweep also adds it to the
    state."""
    token, keep, sight, x_b, factors_b, w_b, S, z = _meet(
        S, z, of_columns, side, counts, b, h, start, length, at, last, chunk, k, v, VISIBLE, REVERSE, AUX, DECAY, c
    )
    dP = dot(w.to(c.DOT), tl.trans(w_b.to(c.DOT)), c)
    if AUX:
        if REVERSE:
            dP += load_scalars(side, side.aux, b, h, token, keep, c)[None, :]
        else:
            dP += row_aux[:, None]
    dP = _masked(dP, sight, running, later, REVERSE, DECAY, side.later is not None)
    new_parts = ()
    for rank in tl.static_range(c.R):
        weighted = (dP * factors_b[rank][None, :]).to(c.DOT)
        new_parts = new_parts + (add_dot(parts[rank], weighted, x_b.to(c.DOT), c),)
    return new_parts, S, z


@triton.jit
def features_against(
    a, b_side, span, states, part, part_strides, dfactors, sums, groups, c, REVERSE: tl.constexpr,
    ROW_AUX: tl.constexpr, COLUMN_AUX: tl.constexpr,
):  # fmt: skip
    """Before ``feature_gradients``, as ``read_against``: the gradients of x into ``part`` [batch, token, head, K],
    those of factors and x . dx into ``dfactors`` and ``sums``. There the first tile of K finds ``diagonal_sums``."""
    tiles = tl.cdiv(c.K, c.BK)
    tile = tl.program_id(0) % tiles
    n, place = locate(span, tl.program_id(0) // tiles)
    h = tl.program_id(1)
    if n < span.sequences:
        b, start, first, last, _b_start, _length, _segments, slot = _rows_and_columns(span, span, n, place)
        k = tile * c.BK + tl.arange(0, c.BK)
        v = tl.arange(0, c.BV)
        i = tl.arange(0, c.C)
        S, z = load_state(states + ((slot + place) * groups + h) * (c.R * c.K * (c.V + 1)), k, v, c)
        chunks = tl.cdiv(last - first, c.C)
        for turn in range(chunks):
            at = first + (turn if REVERSE else (chunks - 1 - turn)) * c.C
            token = start + at
            left = last - at
            keep = kept_tokens(a, b, token, left, c)
            w = load_values(a, b, h, token, keep, v, c)
            row_aux = _row_aux(a, b, h, token, keep, REVERSE, ROW_AUX, c)
            parts = _features_of_state(w, row_aux, S, z, ROW_AUX, c)
            _running, whole, of_rows, of_columns = load_decays(a, a.later, b, h, token, left, not REVERSE, c)
            parts = times(parts, of_rows[:, None], c)
            x, gradient, of_factors = _through_features(a, parts, b, h, token, keep, k, c)
            base = part + b * part_strides[0] + token * part_strides[1] + h * part_strides[2]
            places = base + i[:, None] * part_strides[1] + k[None, :]
            tl.store(places, gradient, mask=tile_mask(i < left, k, c.K, c.BK))
            at_head = _plane_row(a, span, tile, b, h)
            _store_factor_gradients(a, of_factors, dfactors, at_head, b, h, token, keep, left, False, c)
            total = tl.sum(gradient * x.to(tl.float32), axis=1)
            total += tl.load(sums + at_head + token + i, mask=(i < left) & (tile == 0), other=0.0)
            tl.store(sums + at_head + token + i, total, mask=i < left)
            S, z = _absorb_against(S, z, whole, of_columns, b_side, b, h, token, left, k, v, COLUMN_AUX, c)


@triton.jit
def _row_aux(side, b, h, token, keep, REVERSE: tl.constexpr, AUX: tl.constexpr, c):
    """The normaliser's channel [C] of rows: ``aux`` of queries, 1 of keys."""
    if AUX and not REVERSE:
        return load_scalars(side, side.aux, b, h, token, keep, c)
    else:
        return tl.zeros([c.C], tl.float32) + 1.0


@triton.jit
def feature_gradients(
    a, b_side, a_span, b_span, states, counts, count_stride, dx, dx_strides, dfactors, row_sums, part, later_sums,
    groups, c, ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr, VISIBLE: tl.constexpr,
    REVERSE: tl.constexpr, ROW_AUX: tl.constexpr, COLUMN_AUX: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, or, REVERSE, of keys: of x, and per tile of K of factors (or of angles, or the proportion).

    ``dfactors`` [tiles, batch, head, R, token] (R / 2 of angles, none of the proportion); with a decay ``row_sums``
    [tiles, batch, head, token] gets x . dx. ``part`` and ``later_sums`` are what ``features_against`` has left, or
    None; then it has begun with ``dfactors`` too, and ``row_sums`` are without ``later_sums``. The normaliser's channel
    is ``aux`` of the queries and 1 of the keys. BV holds all of V, and no module is run.
    Grid: (tiles of K x segments of rows, heads of rows).
    """
    tiles = tl.cdiv(c.K, c.BK)
    tile = tl.program_id(0) % tiles
    n, place = locate(a_span, tl.program_id(0) // tiles)
    h = tl.program_id(1)
    if n < a_span.sequences:
        g = h // ROW_SHARE
        b, start, first, last, b_start, b_length, b_segments, slot = _rows_and_columns(a_span, b_span, n, place)
        k = tile * c.BK + tl.arange(0, c.BK)
        v = tl.arange(0, c.BV)
        i = tl.arange(0, c.C)
        chunks = tl.cdiv(last - first, c.C)
        own = counts  # of this sequence
        if VISIBLE == COUNTS:
            own = counts + b * count_stride + (b_start if REVERSE else start)
        entry, done = _entry(
            own, place, first, last, b_segments, b_span.segment_tokens, b_length, VISIBLE, REVERSE, c.C
        )
        S, z = load_state(states + ((slot + entry) * groups + g) * (c.R * c.K * (c.V + 1)), k, v, c)
        at_head = _plane_row(a, a_span, tile, b, h)
        for turn in range(chunks):
            at = first + ((chunks - 1 - turn) if REVERSE else turn) * c.C
            token = start + at
            keep = kept_tokens(a, b, token, last - at, c)
            w = load_values(a, b, h, token, keep, v, c)
            if VISIBLE == COUNTS:
                done, S, z = _absorb_seen(
                    done,
                    S,
                    z,
                    b_side,
                    own,
                    b,
                    g,
                    b_start,
                    b_length,
                    at,
                    last,
                    COLUMN_SHARE,
                    k,
                    v,
                    COLUMN_AUX,
                    REVERSE,
                    c,
                )
            row_aux = _row_aux(a, b, h, token, keep, REVERSE, ROW_AUX, c)
            parts = _features_of_state(w, row_aux, S, z, ROW_AUX, c)
            running = tl.zeros([c.C], tl.float32)
            of_columns = running
            if DECAY:
                running, whole, of_rows, of_columns = load_decays(a, a.decay, b, h, token, last - at, REVERSE, c)
                parts = times(parts, of_rows[:, None], c)
                S, z = fade(S, z, tl.exp(whole), c)
            if VISIBLE == CAUSAL and COLUMN_SHARE == 1:
                later = running
                if a.later is not None:
                    later, _total = running_sum(a, a.later, b, h, token, last - at, c)
                parts, S, z = _features_chunk(
                    parts, S, z, w, row_aux, running, later, of_columns, b_side, own, b, g, b_start, b_length, at,
                    last, at // c.C, k, v, VISIBLE, REVERSE, COLUMN_AUX, DECAY, c,
                )  # fmt: skip
            elif VISIBLE != ALL:
                low, high = _chunks_to_meet(own, at, last, done, b_length, VISIBLE, REVERSE, c.C)
                for chunk in range(low, high):
                    for j in range(COLUMN_SHARE):
                        parts, S, z = _features_chunk(
                            parts, S, z, w, row_aux, running, running, of_columns, b_side, own, b,
                            g * COLUMN_SHARE + j, b_start, b_length, at, last, chunk, k, v, VISIBLE, REVERSE,
                            COLUMN_AUX, DECAY, c,
                        )  # fmt: skip
            x, gradient, of_factors = _through_features(a, parts, b, h, token, keep, k, c)
            more = part is not None
            _store_factor_gradients(a, of_factors, dfactors, at_head, b, h, token, keep, last - at, more, c)
            offset = b * dx_strides[0] + token * dx_strides[1] + h * dx_strides[2]
            places = offset + i[:, None] * dx_strides[1] + k[None, :]
            inside = tile_mask(i < last - at, k, c.K, c.BK)
            if part is not None:
                gradient += tl.load(part + places, mask=inside, other=0.0)
            if a.relu is not None:
                gradient = tl.where(x.to(tl.float32) > 0, gradient, 0.0)
            if DECAY:
                sums = tl.sum(gradient * x.to(tl.float32), axis=1)
                if part is not None:
                    sums -= tl.load(later_sums + at_head + token + i, mask=i < last - at, other=0.0)
                tl.store(row_sums + at_head + token + i, sums, mask=i < last - at)
            tl.store(dx + places, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _through_features(side, parts, b, h, token, keep, k, c):
    """(x [C, BK], its gradient, the gradients of its R factors [C]) from the gradients of R features. Hidden tokens
    get 0."""
    x, factors = load_columns(side, b, h, token, keep, k, 0, c)
    gradient = parts[0] * factors[0][:, None]
    for rank in tl.static_range(1, c.R):
        gradient += parts[rank] * factors[rank][:, None]
    of_factors = ()
    for rank in tl.static_range(c.R):
        of_factor = tl.sum(parts[rank] * x.to(tl.float32), axis=1)
        if side.scale is not None:
            of_factor = of_factor * load_scalars(side, side.scale, b, h, token, keep, c)
        of_factors = of_factors + (of_factor,)
    return x, tl.where(keep[:, None], gradient, 0.0), of_factors


@triton.jit
def _store_factor_gradients(side, of_factors, dfactors, at_head, b, h, token, keep, left, MORE: tl.constexpr, c):
    """Store the gradients [C] of factors, or of the angles or the proportion that they are made of; MORE: added to
    those there. ``at_head`` tokens come before this head's. Hidden tokens get 0."""
    if side.score is not None:
        p = load_scalars(side, side.score, b, h, token, keep, c)
        turn = of_factors[1] * cosine_of(p) - of_factors[0] * sine_of(p)
        _store_row(dfactors + at_head + token, turn * 1.5707963267948966, keep, left, MORE, c)
    elif side.angles is not None:
        factors = load_factors(side, 0.0, b, h, token, keep, c)
        half: tl.constexpr = c.R // 2
        for rank in tl.static_range(half):
            turn = of_factors[half + rank] * factors[rank] - of_factors[rank] * factors[half + rank]
            _store_row(dfactors + at_head * half + rank * side.tokens + token, turn, keep, left, MORE, c)
    elif side.factors is not None:
        for rank in tl.static_range(c.R):
            _store_row(dfactors + at_head * c.R + rank * side.tokens + token, of_factors[rank], keep, left, MORE, c)


@triton.jit
def _store_row(pointer, numbers, keep, left, MORE: tl.constexpr, c):
    i = tl.arange(0, c.C)
    numbers = tl.where(keep, numbers, 0.0)
    if MORE:
        numbers += tl.load(pointer + i, mask=i < left, other=0.0)
    tl.store(pointer + i, numbers, mask=i < left)


@triton.jit
def diagonal_sums(queries, keys, span, query_sums, key_sums, c, AUX: tl.constexpr):
    """x . dx [batch, head, token] of queries and of later keys in the same chunk, for the gradient of ``later``.

    Grid: (segments, H). BK and BV hold all of K and V.
    """
    n, place = locate(span, tl.program_id(0))
    h = tl.program_id(1)
    if n < span.sequences:
        b, start, length, _segments, _slot = extent_of(span, n)
        first = place * span.segment_tokens
        last = tl.minimum(first + span.segment_tokens, length)
        k = tl.arange(0, c.BK)
        v = tl.arange(0, c.BV)
        i = tl.arange(0, c.C)
        for at in range(first, last, c.C):
            token = start + at
            keep = kept_tokens(queries, b, token, last - at, c)
            keep_k = kept_tokens(keys, b, token, last - at, c)
            x, factors = load_columns(queries, b, h, token, keep, k, 0, c)
            x_k, factors_k = load_columns(keys, b, h, token, keep_k, k, 0, c)
            P = dot(x.to(c.DOT), tl.trans(x_k.to(c.DOT)), c) * _sigma(factors, factors_k, c)
            w = load_values(queries, b, h, token, keep, v, c)
            dP = dot(w.to(c.DOT), tl.trans(load_values(keys, b, h, token, keep_k, v, c).to(c.DOT)), c)
            if AUX:
                dP += load_scalars(queries, queries.aux, b, h, token, keep, c)[:, None]
            later, _total = running_sum(queries, queries.later, b, h, token, last - at, c)
            between = tl.where(i[:, None] < i[None, :], -_differences(later, False), LEAST_STEP)
            P = P * dP * tl.exp(between)
            where = (b * queries.heads + h) * queries.tokens + token + i
            tl.store(query_sums + where, tl.sum(P, axis=1), mask=i < last - at)
            tl.store(key_sums + where, tl.sum(P, axis=0), mask=i < last - at)


# ---- before and after the sweeps -------------------------------------------------------------------------------------


@triton.jit
def numerator_gradients(
    grad, grad_strides, output, output_strides, normaliser, scale, aux, tokens, heads, rows, eps, V,
    BLOCK: tl.constexpr, BV: tl.constexpr,
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
    span, forward_states, reverse_states, to_sums, from_sums, gradient, tokens, groups, to_tiles, from_tiles, D,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient [batch, head, token] of a decay from keys to later queries, or (``later``) from queries to later
    keys: ``from_sums`` and ``forward_states`` are of those, ``to_sums`` and ``reverse_states`` of these.

    In the running sum from a segment's start, every term with phi_q(t) has a factor exp(+sum_t), every term with
    phi_k(t) exp(-sum_t), and the state behind the segment exp(+sum at its end). Grid: (segments, H).
    """
    n, place = locate(span, tl.program_id(0))
    h = tl.program_id(1)
    if n < span.sequences:
        b, start, length, segments, slot = extent_of(span, n)
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
            for tile in range(to_tiles):
                steps += tl.load(to_sums + tile * plane + where, mask=inside, other=0.0)
            for tile in range(from_tiles):
                steps -= tl.load(from_sums + tile * plane + where, mask=inside, other=0.0)
            total = tl.sum(steps, axis=0)
            tl.store(gradient + where, carried + total - tl.cumsum(steps, axis=0) + steps, mask=inside)
            carried += total
