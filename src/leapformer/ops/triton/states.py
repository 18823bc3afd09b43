"""States in registers and in memory, and the two kernels that make them. Letters as in sweeps.py."""

# Triton compiles this, and not all of it is Python to a type checker.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from leapformer.ops.triton.loading import (
    add_dot,
    extent_of,
    kept_tokens,
    load_columns,
    load_decays,
    load_scalars,
    load_values,
    locate,
    times,
)  # fmt: skip


@triton.jit
def state_places(k, v, rank, c):
    """Offsets and masks in a state row of one rank's kv [BK, BV] and z [BK]."""
    row = rank * c.K + k
    return row[:, None] * c.V + v[None, :], (k < c.K)[:, None] & (v < c.V)[None, :], c.R * c.K * c.V + row, k < c.K


@triton.jit
def load_state(row, k, v, c):
    S = ()
    z = ()
    for rank in tl.static_range(c.R):
        kv_at, kv_in, z_at, z_in = state_places(k, v, rank, c)
        S = S + (tl.load(row + kv_at, mask=kv_in, other=0.0),)
        z = z + (tl.load(row + z_at, mask=z_in, other=0.0),)
    return S, z


@triton.jit
def zero_state(c):
    S = ()
    z = ()
    for _rank in tl.static_range(c.R):
        S = S + (tl.zeros([c.BK, c.BV], tl.float32),)
        z = z + (tl.zeros([c.BK], tl.float32),)
    return S, z


@triton.jit
def fade(S, z, factor, c):
    """S and z times a number."""
    new_S = ()
    new_z = ()
    for rank in tl.static_range(c.R):
        new_S = new_S + (S[rank] * factor,)
        new_z = new_z + (z[rank] * factor,)
    return new_S, new_z


@triton.jit
def add_columns(S, z, x, factors, w, side, b, h, token, keep, AUX: tl.constexpr, c):
    """S and z with a chunk of columns more. Keys count as 1 in z, queries as ``aux``."""
    new_S = ()
    new_z = ()
    columns = tl.trans(x.to(c.DOT))
    for rank in tl.static_range(c.R):
        if AUX:
            by = factors[rank]
            if side.aux is not None:
                by = by * load_scalars(side, side.aux, b, h, token, keep, c)
            new_z = new_z + (z[rank] + tl.sum(x.to(tl.float32) * by[:, None], axis=0),)
        else:
            new_z = new_z + (z[rank],)
        weighted = (w.to(tl.float32) * factors[rank][:, None]).to(c.DOT)
        new_S = new_S + (add_dot(S[rank], columns, weighted, c),)
    return new_S, new_z


@triton.jit
def _absorb_head(S, z, side, b, h, token, keep, k, v, store, of_columns, AUX: tl.constexpr, DECAY: tl.constexpr, c):
    x, factors = load_columns(side, b, h, token, keep, k, store, c)
    if DECAY:
        factors = times(factors, of_columns, c)
    w = load_values(side, b, h, token, keep, v, c)
    return add_columns(S, z, x, factors, w, side, b, h, token, keep, AUX, c)


@triton.jit
def absorb(
    S, z, side, b, g, token, left, HEADS: tl.constexpr, keep, k, v, store, AUX: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, c,
):  # fmt: skip
    """Add one chunk of columns, of every head that shares the state, to S and z."""
    of_columns = 1.0
    if DECAY:
        running, total, of_rows, of_columns = load_decays(side, side.decay, b, g, token, left, REVERSE, c)
        S, z = fade(S, z, tl.exp(total), c)
    if HEADS == 1:
        S, z = _absorb_head(S, z, side, b, g, token, keep, k, v, store, of_columns, AUX, DECAY, c)
    else:
        for j in range(HEADS):
            S, z = _absorb_head(S, z, side, b, g * HEADS + j, token, keep, k, v, store, of_columns, AUX, DECAY, c)
    return S, z


@triton.jit
def segment_states(
    side,
    span,
    states,
    totals,
    groups,
    c,
    HEADS: tl.constexpr,
    AUX: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The sum of every segment, as if it began from nothing, into the slots of ``states`` [slots, G, R K (V + 1)].

    Grid: (tiles of V x segments, G). With a decay the log decay of each segment goes to ``totals`` [slots, G].
    """
    tiles = tl.cdiv(c.V, c.BV)
    tile = tl.program_id(0) % tiles
    n, place = locate(span, tl.program_id(0) // tiles)
    g = tl.program_id(1)
    if n < span.sequences:
        b, start, length, segments, slot = extent_of(span, n)
        k = tl.arange(0, c.BK)
        v = tile * c.BV + tl.arange(0, c.BV)
        S, z = zero_state(c)
        first = place * span.segment_tokens
        last = tl.minimum(first + span.segment_tokens, length)
        chunks = tl.cdiv(last - first, c.C)
        decay = 0.0
        for step in range(chunks):
            if REVERSE:
                at = first + (chunks - 1 - step) * c.C
            else:
                at = first + step * c.C
            token = start + at
            keep = kept_tokens(side, b, token, last - at, c)
            store = tl.where(tile == 0, last - at, 0)
            S, z = absorb(S, z, side, b, g, token, last - at, HEADS, keep, k, v, store, AUX, DECAY, REVERSE, c)
            if DECAY:
                decay += tl.sum(load_scalars(side, side.decay, b, g, token, tl.arange(0, c.C) < last - at, c), axis=0)
        row = states + ((slot + place) * groups + g) * (c.R * c.K * (c.V + 1))
        for rank in tl.static_range(c.R):
            kv_at, kv_in, z_at, z_in = state_places(k, v, rank, c)
            tl.store(row + kv_at, S[rank], mask=kv_in)
            tl.store(row + z_at, z[rank], mask=z_in & (tile == 0))
        if DECAY:
            tl.store(totals + (slot + place) * groups + g, decay, mask=tile == 0)


@triton.jit
def scan_states(
    span, states, totals, kv, z, final_kv, final_z, groups, KV, D, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sums of segments -> the state with which the sweep enters each, in place; the last slot and ``final_*`` get the
    end.

    ``kv`` and ``z`` (None: nothing) are where the sweep starts from; ``final_*`` may be None too.
    Grid: (sequences, G, numbers of a row / BLOCK).
    """
    n, g = tl.program_id(0), tl.program_id(1)
    b, start, length, segments, slot = extent_of(span, n)
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
    if final_kv is not None:
        tl.store(final_kv + own + i, state, mask=i < KV)
        tl.store(final_z + own_z + (i - KV), state, mask=(i >= KV) & (i < D))
