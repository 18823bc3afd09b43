// Attention with a decay where later keys are seen too: one sequence and one head, forward and backward.
//
// With L the running sum of log_decay, its own step included, and M that of later_decay before the token, a tile has
//
//     A = (x_q x_k^T) * sigma * D,  D_ij = exp(L_i - L_j) for j <= i, exp(M_j - M_i) for j > i
//     numerator = A v + exp(L) phi_q S + exp(M_end - M) phi_q U,  normaliser = A 1 + exp(L) phi_q z + exp(M_end - M) phi_q y
//     S, z = exp(L_end) (S, z) + (exp(L_end - L) phi_k)^T [v, 1],  U, y = exp(M_end) (U, y) + (exp(M) phi_k)^T [v, 1]
//
// with S, z the state of the keys before the tile, and U, y that of those behind it: one product of scores serves both. Two
// sweeps over the tiles need no state but the running one. Forward, the first runs from the end, adds up U and leaves what the
// queries read of it; the second runs from the start, adds up S and finishes the outputs. Backward, the gradient of U runs with
// S from the start and that of S with U from the end, so the first sweep has what queries read of S and what keys get through
// dU, and the second the rest:
//
//     dA = g v^T + d,  dphi_q = exp(L) (g S^T + d z^T) + exp(M_end - M) (g U^T + d y^T)
//     dphi_k = exp(L_end - L) (v dS^T + dz^T) + exp(M) (v dU^T + dy^T),  dv = A^T g + exp(L_end - L) phi_k dS + exp(M) phi_k dU
//
// log_decay[t] stands in the exponent of all pairs j < t <= i. With a_i the sum over all earlier keys, the state among them, of
// weight times gradient at query i, and b_j that over all later queries of key j,
//
//     dlog_decay[t] = S_e . dS_e + sum over t <= i < e of (a_i - b_i)
//
// for any e; it is the end of the group of SUPER tiles, for which the forward pass has kept S, so that sums stay short.
// later_decay[t] stands in the exponent of all pairs i <= t < j: with a and b counted towards the other side, and from the
// group's beginning b on, its gradient is U_b . dU_b + sum over b <= i <= t of (a_i - b_i).
#pragma once

#include "attention.h"
#include "direction.h"

struct TwoSided : Attention {
    // Half of what it is elsewhere: scores are those of whole tiles here, and cost as much as the states.
    static constexpr int STEP = TILE / 2;
    static constexpr long GROUP = TILE * SUPER;
    enum { EARLIER = 0, LATER = 1 };

    Direction earlier, later;
    float *other, *other_z;              // a second state
    float *waiting, *waiting_sum;        // forward, of each token of the piece: numerator and normaliser of later keys
    float *dq_all, *dk_all, *dv_all;     // backward, of each token: what the first sweep has found
    float *dqf_all, *dkf_all;            // of each tile
    float *earlier_share, *later_share;  // of each token: a - b
    float *crossing;                     // of each group: U . dU at its beginning
    float *query_share, *key_share;      // of the tile
    float *factor_sums;

    // Tokens begin .. end - 1 of the sequence.
    struct Span {
        long begin, end;
    };

    TwoSided(const Plan& plan, float* memory, bool backward, float* between) : Attention(plan, memory, backward, between) {
        floats = place(memory, p, s, backward);
    }

    long place(float* memory, const Problem& p, const Shape& s, bool backward) {
        Arena a{memory, Buffers::place(memory, p, s, backward)};
        const long tokens = longest_piece(p), tiles = (tokens + STEP - 1) / STEP;
        other = a.take(long(s.Fp) * s.ldv), other_z = a.take(s.ldf);
        query_share = a.take(TILE), key_share = a.take(TILE);
        if (!backward) {
            waiting = a.take(tokens * s.ldv), waiting_sum = a.take(tokens);
            return a.used;
        }
        St = a.take(long(s.Vp) * s.ldf), factor_sums = a.take(s.R * W);
        dq_all = a.take(tokens * s.ldk), dk_all = a.take(tokens * s.ldk), dv_all = a.take(tokens * s.ldv);
        dqf_all = a.take(tiles * s.R * TILE), dkf_all = a.take(tiles * s.R * TILE);
        earlier_share = a.take(tokens), later_share = a.take(tokens), crossing = a.take(tokens / GROUP + 1);
        return a.used;
    }
    static long longest_piece(const Problem& p) {
        long longest = p.cu_q ? 0 : p.T;
        for (long n = 0; p.cu_q && n < p.N; n++) longest = std::max(longest, long(p.cu_q[n + 1] - p.cu_q[n]));
        const long groups = (longest + GROUP - 1) / GROUP;
        return least(longest, (groups + p.pieces - 1) / p.pieces * GROUP);
    }

    void start(long n, long head) {
        Attention::start(n, head);
        if (p.leap) q_module.load_weights(s, p.q_leap, g);
    }
    Span span(long j) const {
        const Piece piece = plan.piece(seq, j);
        return {least(piece.first * TILE, seq.S), least(piece.last * TILE, seq.S)};
    }
    // Tiles of a span in their order, or from the last to the first: work(start, tokens).
    template <class Do>
    static void upward(Span span, Do work) {
        for (long i = span.begin; i < span.end; i += STEP) work(i, int(least(span.end - i, long(STEP))));
    }
    template <class Do>
    static void downward(Span span, Do work) {
        for (long i = span.begin + (span.end - span.begin - 1) / STEP * STEP; i >= span.begin && span.begin < span.end; i -= STEP)
            work(i, int(least(span.end - i, long(STEP))));
    }

    // ---- tiles ------------------------------------------------------------------------------------------------------

    void load_decays(long start, int n) {
        const long token = seq.q0 + start;
        earlier.load_earlier(n, [&](int i) { return at(p.log_decay, token + i, g, 0); });
        later.load_later(n, [&](int i) { return at(p.later_decay, token + i, g, 0); });
    }
    void load_tables(int n) { earlier.load_tables(n, true), later.load_tables(n, false); }

    // D_ij for all j of the tile.
    void decay_row(int i, int columns, float* row) const {
        constexpr int BLOCK = Direction::BLOCK;
        const int block = i / BLOCK, low = block * BLOCK, high = low + BLOCK;
        for (int j = 0; j < low; j += W) store(row + j, splat(earlier.near[i]) * load(earlier.far[block] + j));
        for (int j = high; j < columns; j += W) store(row + j, splat(later.near[i]) * load(later.far[block] + j));
        const double own = earlier.sum[i], own_later = later.sum[i];
        for (int j = low; j < high; j++) {
            const double before = own - earlier.sum[j], behind = own_later - later.sum[j];
            row[j] = float(j <= i ? before : behind);
        }
        exponentials(BLOCK, row + low);
    }

    // state = keep state + (weight f x)^T [v, 1] of the loaded keys, or of queries and their gradients.
    void absorb_keys(const float* weight, float keep, float* state, float* z_of) {
        features(s, keys, kx, weighted(kf, weight), phi_k);
        product(s.F, s.Vp, keys, by_columns(phi_k, s.ldf), v, s.ldv, state, state, s.ldv, {}, keep);
        scale(z_of, keep), add_rows(keys, s.Fp, phi_k, s.ldf, nullptr, z_of);
    }
    void absorb_queries(int n, const float* weight, float keep, float* state, float* z_of) {
        features(s, n, qx, weighted(qf, weight), phi_q);
        product(s.F, s.Vp, n, by_columns(phi_q, s.ldf), gn, s.ldv, state, state, s.ldv, {}, keep);
        scale(z_of, keep), add_rows(n, s.Fp, phi_q, s.ldf, gd, z_of);
    }
    void scale(float* z_of, float keep) const {
        for (int c = 0; c < s.Fp; c += W) store(z_of + c, splat(keep) * load(z_of + c));
    }
    void clear(float* state, float* z_of) const {
        memset(state, 0, sizeof(float) * s.Fp * s.ldv), memset(z_of, 0, sizeof(float) * s.ldf);
    }

    float* checkpoint(long token, int side) const {
        return p.checkpoints + ((plan.checkpoint(seq, token / TILE) * p.G + g) * 2 + side) * s.state();
    }
    // The state at a boundary of groups goes to the backward pass.
    void keep_checkpoint(long token, int side) const {
        if (!p.checkpoints || token % GROUP || token == 0 || token >= seq.S) return;
        float* to = checkpoint(token, side);
        write_state(S, z, to, to + long(s.F) * s.V);
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    // scores -> weights, and row_sum += their sums. PLAIN: sigma is 1.
    template <int RANK, bool PLAIN>
    void weigh(int n) {
        float decay[TILE];
        const int columns = up16(n);
        for (int i = 0; i < n; i++) {
            Vec sum{};
            decay_row(i, columns, decay);
            for (int j = 0; j < columns; j += W) {
                Vec weight = load(scores + i * s.ldc + j) * load(decay + j);
                if (!PLAIN) weight *= sigma<RANK>(qf, i, j);
                sum += weight;
                store(weights + i * s.ldc + j, weight);
            }
            row_sum[i] += total(sum);
        }
    }
    bool plain() const { return !p.leap && !p.k_factors.data && !p.key_mask; }
    void weigh_any(int n) {
        if (plain()) return weigh<1, true>(n);
        if (s.R == 1) return weigh<1, false>(n);
        if (s.R == 2) return weigh<2, false>(n);
        weigh<0, false>(n);
    }

    // num and row_sum += what n queries read of S and z; the first sweep starts from nothing.
    void read(int n, const float* weight, bool first) {
        features(s, n, qx, weighted(qf, weight), phi_q);
        product(n, s.Vp, s.F, by_rows(phi_q, s.ldf), S, s.ldv, first ? nullptr : num, num, s.ldv);
        for (int a = 0; a < n; a++) row_sum[a] = (first ? 0 : row_sum[a]) + dot(phi_q + a * s.ldf, z, s.Fp);
    }

    void forward(long, long j) {
        const Span own = span(j);
        if (p.pieces == 1)
            clear(S, z);
        else
            read_handed(handed(j, 2), S, z);
        downward(own, [&](long i, int n) {
            keep_checkpoint(i + n, LATER);
            load_tile(own, i, n);
            read(n, later.query, true);
            absorb_keys(later.key, later.whole, S, z);
        });
        if (p.pieces == 1)
            read_given_state(p.kv, p.z, S, z);
        else
            read_handed(handed(j), S, z);
        upward(own, [&](long i, int n) {
            keep_checkpoint(i, EARLIER);
            load_tile(own, i, n);
            load_tables(n);
            read(n, earlier.query, false);
            transpose(kx, s.ldk, up16(n), s.Kp, kt, s.ldc);
            product(n, up16(n), s.K, by_rows(qx, s.ldk), kt, s.ldc, nullptr, scores, s.ldc);
            weigh_any(n);
            product(n, s.Vp, n, by_rows(weights, s.ldc), v, s.ldv, num, num, s.ldv);
            finish(g, i, n);
            absorb_keys(earlier.key, earlier.whole, S, z);
        });
        if (p.pieces == 1) write_final_state();
    }
    void load_tile(Span own, long i, int n) {
        read_keys(i, n);
        read_queries(g, i, n);
        load_decays(i, n);
        num = waiting + (i - own.begin) * s.ldv, row_sum = waiting_sum + (i - own.begin);
    }

    // What the keys of piece j alone make of the state behind it, and of that of later keys before it.
    void sum_keys(long, long j) {
        float kept = 1, kept_later = 1, weight[TILE] = {};
        clear(S, z), clear(other, other_z);
        upward(span(j), [&](long i, int n) {
            read_keys(i, n);
            load_decays(i, n);
            absorb_keys(earlier.key, earlier.whole, S, z);
            times(n, later.key, kept_later, weight);
            absorb_keys(weight, 1, other, other_z);
            kept *= earlier.whole, kept_later *= later.whole;
        });
        write_handed(S, z, kept, handed(j, 0)), write_handed(other, other_z, kept_later, handed(j, 2));
    }
    static void times(int n, const float* weight, float factor, float* to) {
        for (int i = 0; i < up16(n); i++) to[i] = weight[i] * factor;
    }
    void hand_out_states(long, long) {
        read_given_state(p.kv, p.z, S, z);
        hand_out(EARLIER, true, S, z);
        write_final_state();
        clear(S, z);
        hand_out(LATER, false, S, z);
    }
    // What each piece starts from in place of what it makes, from the first to the last, or from the last to the first.
    void hand_out(int side, bool up, float* state, float* z_of) const {
        for (long step = 0; step < p.pieces; step++) {
            const long j = up ? step : p.pieces - 1 - step;
            float *own = handed(j, 2 * side), *sums = handed(j, 2 * side + 1);
            memcpy(sums, own, sizeof(float) * handed_size(s));
            write_handed(state, z_of, 1, own);
            add_handed(sums, sums[s.state()], state, z_of);
        }
    }

    // ---- backward ---------------------------------------------------------------------------------------------------

    // What the queries of piece j alone add to the gradient of the state before it, and to that of later keys behind it.
    void sum_queries(long, long j) {
        float kept = 1, kept_later = 1, weight[TILE] = {};
        clear(dS, dz), clear(other, other_z);
        upward(span(j), [&](long i, int n) {
            read_queries(g, i, n);
            load_grad(g, i, n);
            load_decays(i, n);
            times(n, earlier.query, kept, weight);
            absorb_queries(n, weight, 1, dS, dz);
            absorb_queries(n, later.query, later.whole, other, other_z);
            kept *= earlier.whole, kept_later *= later.whole;
        });
        write_handed(dS, dz, kept, handed(j, 0)), write_handed(other, other_z, kept_later, handed(j, 2));
    }
    void hand_out_gradients(long, long) {
        read_given_state(p.grad_kv, p.grad_z, dS, dz);
        hand_out(EARLIER, false, dS, dz);
        clear(dS, dz);
        hand_out(LATER, true, dS, dz);
    }

    void backward(long slot, long j) {
        const Span own = span(j);
        start_upward(own, j);
        upward(own, [&](long i, int n) {
            if (i % GROUP == 0) crossing[(i - own.begin) / GROUP] = i ? float(along_state(checkpoint(i, LATER))) : 0;
            load_tile_backward(own, i, n);
            through_states(n, earlier, later, true);
            const long first = i - own.begin;
            for (int a = 0; a < n; a++) earlier_share[first + a] = query_share[a], later_share[first + a] = -key_share[a];
        });
        start_downward(own, j);
        double since_end = 0;
        downward(own, [&](long i, int n) {
            const long end = i + n, first = i - own.begin;
            if (end == own.end || end % GROUP == 0) since_end = end < seq.S ? along_state(checkpoint(end, EARLIER)) : along_end();
            load_tile_backward(own, i, n);
            through_states(n, later, earlier, false);
            for (int a = 0; a < n; a++) earlier_share[first + a] -= key_share[a], later_share[first + a] += query_share[a];
            through_scores(n, earlier_share + first, later_share + first);
            write_gradients(slot, i, n);
            since_end = write_decay(i, n, earlier_share + first, since_end);
            if (i % GROUP == 0) write_later_decay(own, i);
        });
        if (p.dz && j == 0) write_state(dS, dz, p.dkv + state_row() * s.F * s.V, p.dz + state_row() * s.F);
    }

    // S^T and z of earlier keys, and the gradient of the state of later ones.
    void start_upward(Span own, long j) {
        if (own.begin == 0)
            read_given_state(p.kv, p.z, other, other_z);
        else
            read_checkpoint(own.begin, EARLIER);
        transpose(other, s.ldv, s.Fp, s.Vp, St, s.ldf);
        memcpy(z, other_z, sizeof(float) * s.ldf);
        if (p.pieces == 1)
            clear(dS, dz);
        else
            read_handed(handed(j, 2), dS, dz);
    }
    // U^T and y of later keys, and the gradient of the state of earlier ones.
    void start_downward(Span own, long j) {
        if (own.end >= seq.S)
            clear(other, other_z);
        else
            read_checkpoint(own.end, LATER);
        transpose(other, s.ldv, s.Fp, s.Vp, St, s.ldf);
        memcpy(z, other_z, sizeof(float) * s.ldf);
        if (p.pieces == 1)
            read_given_state(p.grad_kv, p.grad_z, dS, dz);
        else
            read_handed(handed(j), dS, dz);
    }
    void read_checkpoint(long token, int side) {
        const float* from = checkpoint(token, side);
        read_state(from, from + long(s.F) * s.V, other, other_z);
    }
    // state . dS, of a state as it lies in memory.
    double along_state(const float* kv, const float* z_from) const {
        double sum = 0;
        for (long i = 0; i < s.F; i++) {
            sum += double(z_from[i]) * dz[i];
            float row = 0;
            for (int c = 0; c < s.V; c++) row += kv[i * s.V + c] * dS[i * s.ldv + c];
            sum += row;
        }
        return sum;
    }
    double along_state(const float* state) const { return along_state(state, state + long(s.F) * s.V); }
    double along_end() const {
        return p.grad_z ? along_state(p.final_kv + state_row() * s.F * s.V, p.final_z + state_row() * s.F) : 0;
    }

    void load_tile_backward(Span own, long i, int n) {
        const long first = i - own.begin, tile = first / STEP * s.R * TILE;
        dxq = dq_all + first * s.ldk, dxk = dk_all + first * s.ldk, dv = dv_all + first * s.ldv;
        dqf = dqf_all + tile, dkf = dkf_all + tile;
        read_keys(i, n);
        read_queries(g, i, n);
        load_grad(g, i, n);
        load_decays(i, n);
    }

    // What the queries have of the state in St, which comes in the direction `read`, and the keys through the gradient of the
    // state that takes them in the direction `taken`; then both states move on by this tile.
    void through_states(int n, const Direction& read, const Direction& taken, bool first) {
        transpose(dS, s.ldv, s.Fp, s.Vp, dSt, s.ldf);
        features(s, n, kx, weighted(kf, taken.key), phi_k);
        product(n, s.Vp, s.F, by_rows(phi_k, s.ldf), dS, s.ldv, first ? nullptr : dv, dv, s.ldv);
        product(n, s.Fp, s.V, by_rows(v, s.ldv), dSt, s.ldf, nullptr, dphi_k, s.ldf);
        features_backward(n, kx, kf, dphi_k, dz, nullptr, taken.key, dxk, dkf, key_share, first);
        product(n, s.Fp, s.V, by_rows(gn, s.ldv), St, s.ldf, nullptr, dphi_q, s.ldf);
        features_backward(n, qx, qf, dphi_q, z, gd, read.query, dxq, dqf, query_share, first);

        features(s, n, kx, weighted(kf, read.key), phi_k);
        product(s.V, s.Fp, n, by_columns(v, s.ldv), phi_k, s.ldf, St, St, s.ldf, {}, read.whole);
        scale(z, read.whole), add_rows(n, s.Fp, phi_k, s.ldf, nullptr, z);
        absorb_queries(n, taken.query, taken.whole, dS, dz);
    }

    // The pairs of the tile. Each adds its weight times its gradient to the shares of its query, and takes it from its key's.
    void through_scores(int n, float* earlier_of, float* later_of) {
        load_tables(n);
        const int columns = up16(n);
        transpose(kx, s.ldk, columns, s.Kp, kt, s.ldc);
        transpose(v, s.ldv, columns, s.Vp, vt, s.ldc);
        product(n, columns, s.K, by_rows(qx, s.ldk), kt, s.ldc, nullptr, scores, s.ldc);
        product(n, columns, s.V, by_rows(gn, s.ldv), vt, s.ldc, nullptr, weights, s.ldc);
        weigh_backward_any(n, earlier_of, later_of);
        product(n, s.Kp, n, by_rows(weights, s.ldc), kx, s.ldk, dxq, dxq, s.ldk);
        product(n, s.Kp, n, by_columns(weights, s.ldc), qx, s.ldk, dxk, dxk, s.ldk);
        product(n, s.Vp, n, by_columns(scores, s.ldc), gn, s.ldv, dv, dv, s.ldv);
    }

    // scores and dA (in `weights`) -> A (in `scores`) and dA sigma D (in `weights`); gradients of factors and decays.
    template <int RANK, bool PLAIN>
    void weigh_backward(int n, float* earlier_of, float* later_of) {
        const int columns = up16(n), R = RANK ? RANK : s.R;
        float decay[TILE], of_earlier[TILE] = {}, of_later[TILE] = {};
        for (int i = 0; i < n; i++) {
            float *score_row = scores + i * s.ldc, *row = weights + i * s.ldc;
            Vec sums[RANK ? RANK : 1] = {}, before{}, behind{};
            if (!RANK) memset(factor_sums, 0, sizeof(float) * s.R * W);
            decay_row(i, columns, decay);
            for (int j = 0; j < columns; j += W) {
                const Vec kept = load(decay + j);
                Vec weight = load(score_row + j) * kept, grad = load(row + j) + splat(gd[i]), share = grad * weight;
                grad *= kept;
                if (!PLAIN) {
                    const Vec both = sigma<RANK>(qf, i, j);
                    for (int r = 0; r < R; r++) {
                        const Vec part = share * load(kf + r * TILE + j);
                        if (RANK)
                            sums[RANK ? r : 0] += part;
                        else
                            store(factor_sums + r * W, load(factor_sums + r * W) + part);
                        store(dkf + r * TILE + j, load(dkf + r * TILE + j) + share * splat(qf[r * TILE + i]));
                    }
                    weight *= both, grad *= both, share *= both;
                }
                store(score_row + j, weight);
                store(row + j, grad);
                // A pair of a token with itself doesn't decay.
                if (j <= i) {
                    const Vec part = j + W > i ? keep(lanes_below(i - j), share) : share;
                    before += part;
                    store(of_earlier + j, load(of_earlier + j) + part);
                }
                if (j + W > i) {
                    const Vec part = j <= i ? keep(~lanes_below(i - j + 1), share) : share;
                    behind += part;
                    store(of_later + j, load(of_later + j) + part);
                }
            }
            for (int r = 0; !PLAIN && r < R; r++) dqf[r * TILE + i] += total(RANK ? sums[RANK ? r : 0] : load(factor_sums + r * W));
            earlier_of[i] += total(before), later_of[i] += total(behind);
        }
        for (int i = 0; i < n; i++) earlier_of[i] -= of_earlier[i], later_of[i] -= of_later[i];
    }
    void weigh_backward_any(int n, float* earlier_of, float* later_of) {
        if (plain()) return weigh_backward<1, true>(n, earlier_of, later_of);
        if (s.R == 1) return weigh_backward<1, false>(n, earlier_of, later_of);
        if (s.R == 2) return weigh_backward<2, false>(n, earlier_of, later_of);
        weigh_backward<0, false>(n, earlier_of, later_of);
    }

    void write_gradients(long slot, long i, int n) {
        write_query_gradients(g, i, n, p.leap ? p.q_leap.gradient + (slot * p.H + g) * gradient_size(p.q_leap, s.K) : nullptr);
        write_key_gradients(p.leap ? p.k_leap.gradient + (slot * p.G + g) * gradient_size(p.k_leap, s.K) : nullptr);
    }
    // From the end of a group to the tile: the sum goes on with the tile before it.
    double write_decay(long i, int n, const float* share, double sum) const {
        const long row = (seq.batch * p.T + seq.q0 + i) * p.H + g;
        for (int a = n - 1; a >= 0; a--) {
            sum += share[a];
            if (p.dlog_decay) p.dlog_decay[row + a * p.H] = float(sum);
        }
        return sum;
    }
    // Of the group that begins at token i, all of whose shares are there. No key is later than the last.
    void write_later_decay(Span own, long i) const {
        const long row = (seq.batch * p.T + seq.q0) * p.H + g, end = least(i + GROUP, own.end);
        double sum = crossing[(i - own.begin) / GROUP];
        for (; p.dlater_decay && i < end; i++) {
            sum += later_share[i - own.begin];
            p.dlater_decay[row + i * p.H] = i + 1 < seq.S ? float(sum) : 0;
        }
    }
};
