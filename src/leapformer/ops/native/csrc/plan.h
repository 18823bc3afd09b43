// Who sees what, tile by tile: the order in which queries and key tiles of a sequence are worked through.
//
// Keys come in tiles of 64. The queries of tile m see all keys before it from the state, and the first g(i) - 64 m of its own
// keys through the tile of scores; then the tile is added to the state. Since g never decreases, those are consecutive
// queries, begin(m) .. begin(m + 1) - 1, and each query belongs to one tile: every visibility costs T + S.
#pragma once

#include <stdlib.h>

#include "tile.h"

// One sequence: its rows in the batch, and its lengths.
struct Sequence {
    long index, batch, q0, T, k0, S;
    long tiles() const { return (S + TILE - 1) / TILE; }
};

inline Sequence sequence(const Problem& p, long n) {
    if (!p.cu_q) return {n, n, 0, p.T, 0, p.S};
    return {n, 0, p.cu_q[n], p.cu_q[n + 1] - p.cu_q[n], p.cu_k[n], p.cu_k[n + 1] - p.cu_k[n]};
}

// A part of a sequence for one thread: key tiles with their queries, and some of the queries that follow all keys.
struct Piece {
    long first, last;      // key tiles
    long tail, tail_end;   // queries
};

struct Plan {
    const Problem& p;
    int32_t* counts = nullptr;  // g made safe, clamped to the sequence and never decreasing: [rows, T]
    long* begins = nullptr;     // for visibilities given by counts
    long rows = 0;
    bool complete = true;  // false: there was no memory

    explicit Plan(const Problem& problem) : p(problem) {
        if (!p.counts) return;
        rows = p.cu_q ? p.N : (p.counts_b ? p.B : 1);
        counts = (int32_t*)allocate(sizeof(int32_t) * (p.cu_q ? p.T : rows * p.T) + 1);
        begins = (long*)allocate(sizeof(long) * (p.cu_q ? p.S / TILE + 3 * p.N : rows * (p.S / TILE + 3)) + 1);
        complete = counts && begins;
        if (!complete) return;
        for (long n = 0; n < rows; n++) lay_out(sequence(p, n));
    }
    ~Plan() { free(counts), free(begins); }
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    int32_t* counts_of(const Sequence& s) const { return counts + (p.cu_q ? s.q0 : (p.counts_b ? s.index * p.T : 0)); }
    long* begins_of(const Sequence& s) const {
        if (p.cu_q) return begins + s.k0 / TILE + 3 * s.index;
        return begins + (p.counts_b ? s.index * (s.tiles() + 2) : 0);
    }

    long begin(const Sequence& s, long m) const {
        if (p.causal) return least(m * TILE, s.T);
        if (p.all) return m <= s.tiles() ? 0 : s.T;
        return begins_of(s)[m];
    }
    // How many keys of tile m query i of that tile sees.
    int seen(const Sequence& s, long i, long m) const {
        if (p.causal) return int(i - m * TILE + 1);
        if (p.all) return 0;
        const long more = counts_of(s)[i] - m * TILE;
        return more < 0 ? 0 : int(more);
    }
    // Consecutive queries of tile m from `i` to `end` that fit one tile: all with keys of their own tile, or all without.
    int together(const Sequence& s, long i, long end, long m) const {
        int n = 1;
        if (p.causal || p.all) return int(least(end - i, long(TILE)));
        const bool band = seen(s, i, m) > 0;
        while (n < TILE && i + n < end && (seen(s, i + n, m) > 0) == band) n++;
        return n;
    }

    // Piece j of p.pieces. Key tiles are dealt out in groups of SUPER, so that each piece starts at a checkpoint.
    Piece piece(const Sequence& s, long j) const {
        const long tiles = s.tiles(), groups = (tiles + SUPER - 1) / SUPER;
        const long share = (groups + p.pieces - 1) / p.pieces * SUPER;
        const long start = begin(s, tiles), queries = s.T - start;
        const long step = ((queries + TILE - 1) / TILE + p.pieces - 1) / p.pieces * TILE;
        return {
            least(j * share, tiles), least((j + 1) * share, tiles), start + least(j * step, queries),
            start + least((j + 1) * step, queries)
        };
    }
    bool has_queries(const Sequence& s, const Piece& piece) const {
        return begin(s, piece.first) < begin(s, piece.last);
    }

    // Index of the state at the start of key tile m = 8, 16, ...: [checkpoint, G, R K V + R K].
    long checkpoint(const Sequence& s, long m) const {
        return (p.cu_q ? s.k0 / (TILE * SUPER) : s.index * (p.S / (TILE * SUPER))) + m / SUPER - 1;
    }

   private:
    void lay_out(const Sequence& s) {
        int32_t* own = counts_of(s);
        long* begin = begins_of(s);
        const int64_t* given = p.counts + (p.cu_q ? s.q0 : s.index * p.counts_b);
        int32_t before = 0;
        for (long i = 0; i < s.T; i++) {
            const int64_t clamped = given[i] < 0 ? 0 : (given[i] > s.S ? s.S : given[i]);
            if (clamped > before) before = int32_t(clamped);
            own[i] = before;
        }
        long i = 0;
        begin[0] = 0;
        for (long m = 0; m < s.tiles(); m++) {
            const long start = i, end = least((m + 1) * TILE, s.S);
            while (i < s.T && own[i] < end) i++;
            const long partly = i;
            while (i < s.T && own[i] == end) i++;
            // Those that see the whole tile read it from the state instead, unless they are few beside others.
            if (i - partly > 8 || partly == start) i = partly;
            begin[m + 1] = i;
        }
        begin[s.tiles() + 1] = s.T;
    }
};
