// Linear attention over one sequence and one key head, forward and backward.
//
// With x a tile's queries or keys, f its factors, phi = f x its features and S, z the state of the keys before the tile:
//
//     A = (x_q x_k^T) * sigma,  sigma_ij = sum_r f_r(i) f_r(j)     where i sees j, else 0
//     numerator = A v + phi_q S,  normaliser = A 1 + phi_q z,  output = numerator / max(normaliser, eps)
//     S += phi_k^T v,  z += phi_k^T 1
//
// Backward, with g = grad / normaliser and d = -(g . output) (0 where the normaliser was clamped):
//
//     dA = g v^T + d,  dphi_q = g S^T + d z^T,  dS += phi_q^T g,  dz += phi_q^T d
//     dv = A^T g + phi_k dS,  dphi_k = v dS^T + dz^T
//
// and dx, df follow from dA * sigma, dA * (x_q x_k^T) and dphi. Angles a in place of factors are f = [cos a, sin a], and
// da = cos(a) df_sin - sin(a) df_cos. A decay multiplies sigma_ij by exp(L_i - L_j), the query's factors by exp(L_i) where they
// meet the state, and the key's by exp(L_end - L_j), with L its sum since the tile began. Where later keys are seen too, with a
// decay of their own, it is two_sided.h.
#pragma once

#include "angles.h"
#include "direction.h"
#include "leap.h"
#include "plan.h"

struct Buffers {
    float *kx, *kt, *v, *vt, *phi_k, *kf, *dkf, *dxk, *dv, *dphi_k;
    float *qx, *phi_q, *qf, *dqf, *scores, *weights, *num, *gn, *dphi_q, *dxq;
    float *S, *St, *z, *dS, *dSt, *dz, *super;
    float *eq, *ek, *factors, *row_sum, *column_sum, *gd;
    double* since;  // decay since the start of the tile, a sum
    int *seen, *first, *full;
    uint8_t* real;
    Module q_module, k_module;

    long place(float* memory, const Problem& p, const Shape& s, bool backward) {
        Arena a{memory};
        const long tile_k = TILE * s.ldk, tile_v = TILE * s.ldv, tile_f = TILE * s.ldf, tile_c = TILE * s.ldc;
        kx = a.take(tile_k), kt = a.take(long(s.Kp) * s.ldc), v = a.take(tile_v), phi_k = a.take(tile_f);
        qx = a.take(tile_k), phi_q = a.take(tile_f), scores = a.take(tile_c), weights = a.take(tile_c);
        num = a.take(tile_v);
        kf = a.take(s.R * TILE), qf = a.take(s.R * TILE), factors = a.take(s.R * TILE);
        eq = a.take(TILE), ek = a.take(TILE), row_sum = a.take(TILE), column_sum = a.take(TILE), gd = a.take(TILE);
        S = a.take(long(s.Fp) * s.ldv), z = a.take(s.ldf);
        since = (double*)a.take(2 * TILE), real = (uint8_t*)a.take(TILE / 4);
        seen = (int*)a.take(TILE), first = (int*)a.take(TILE), full = (int*)a.take(TILE);
        if (p.leap) q_module.place(a, s), k_module.place(a, s);
        if (backward) {
            vt = a.take(long(s.Vp) * s.ldc), dxk = a.take(tile_k), dv = a.take(tile_v), dphi_k = a.take(tile_f);
            gn = a.take(tile_v), dphi_q = a.take(tile_f), dxq = a.take(tile_k);
            dkf = a.take(s.R * TILE), dqf = a.take(s.R * TILE);
            St = nullptr, dS = a.take(long(s.Fp) * s.ldv), dSt = a.take(long(s.Vp) * s.ldf), dz = a.take(s.ldf);
            super = a.take((SUPER + 1) * (long(s.Vp) * s.ldf + s.ldf));
        }
        return a.used;
    }
};

// Floats of a state on its way between the pieces of a sequence, and of the decay over one of them.
inline long handed_size(const Shape& s) { return s.state() + 1; }
inline long handed_states(const Problem& p) { return p.later_decay.data ? 4 : 2; }  // of each piece

struct Attention : Buffers {
    const Problem& p;
    const Plan& plan;
    const Shape s;
    float* between;  // [units, pieces, handed_states, handed_size]: states on their way
    Sequence seq;
    long g, key_start = 0;
    int keys = 0;       // of the key tile that is loaded, from key_start of the sequence on
    float all_decay;    // exp of the decay of the whole tile
    bool empty;         // the state is zero
    long floats;        // of its own memory

    Attention(const Plan& plan, float* memory, bool backward, float* between)
        : p(plan.p), plan(plan), s(plan.p), between(between) {
        floats = place(memory, p, s, backward);
    }

    void start(long n, long group) {
        seq = sequence(p, n), g = group;
        if (p.leap) k_module.load_weights(s, p.k_leap, g);
    }

    // ---- state ------------------------------------------------------------------------------------------------------

    long state_row() const { return seq.index * p.G + g; }

    void read_state(const float* kv, const float* z_from, float* S_to, float* z_to) {
        memset(S_to, 0, sizeof(float) * s.Fp * s.ldv), memset(z_to, 0, sizeof(float) * s.ldf);
        empty = true;
        if (!z_from) return;  // not kv: without values it has no address, and z is there all the same
        for (long i = 0; s.V && i < s.F; i++) memcpy(S_to + i * s.ldv, kv + i * s.V, sizeof(float) * s.V);
        memcpy(z_to, z_from, sizeof(float) * s.F);
        for (long i = 0; empty && i < s.F; i++)
            for (int c = 0; c < s.Vp; c++) empty = empty && S_to[i * s.ldv + c] == 0;
        for (long i = 0; empty && i < s.F; i++) empty = z_to[i] == 0;
    }
    void write_state(const float* S_from, const float* z_from, float* kv, float* z_to) const {
        for (long i = 0; s.V && i < s.F; i++) memcpy(kv + i * s.V, S_from + i * s.ldv, sizeof(float) * s.V);
        if (s.F) memcpy(z_to, z_from, sizeof(float) * s.F);
    }
    void read_given_state(const float* kv, const float* z_from, float* S_to, float* z_to) {
        read_state(kv ? kv + state_row() * s.F * s.V : nullptr, z_from ? z_from + state_row() * s.F : nullptr, S_to, z_to);
    }
    // What piece j hands on (0) and, backward, its queries behind all keys (1); after handing out, what it starts from (0).
    float* handed(long j, int which = 0) const {
        return between + ((state_row() * p.pieces + j) * handed_states(p) + which) * handed_size(s);
    }
    void write_handed(const float* S_from, const float* z_from, float decay, float* to) const {
        write_state(S_from, z_from, to, to + long(s.F) * s.V);
        to[s.state()] = decay;
    }
    void read_handed(const float* from, float* S_to, float* z_to) {
        read_state(from, from + long(s.F) * s.V, S_to, z_to);
    }
    // sum = decay sum + what was handed
    void add_handed(const float* from, float decay, float* S_sum, float* z_sum) const {
        for (long i = 0; i < s.F; i++)
            for (int c = 0; c < s.V; c++) S_sum[i * s.ldv + c] = decay * S_sum[i * s.ldv + c] + from[i * s.V + c];
        for (long i = 0; i < s.F; i++) z_sum[i] = decay * z_sum[i] + from[long(s.F) * s.V + i];
    }
    float* checkpoint(long m) const { return p.checkpoints + (plan.checkpoint(seq, m) * p.G + g) * s.state(); }

    // ---- tiles ------------------------------------------------------------------------------------------------------

    // Factors [R, TILE] of tokens from `token` on; 1 where none are given.
    void load_factors(const View& f, long token, long head, int n, float* to) const {
        if (p.angles) return load_angles(f, token, head, n, to);
        for (int r = 0; r < s.R; r++)
            for (int i = 0; i < TILE; i++)
                to[r * TILE + i] = i >= n ? 0 : (f.data ? at(f, token + i, head, r) : 1.0f);
    }
    long factor_width() const { return p.angles ? s.R / 2 : s.R; }
    void load_angles(const View& f, long token, long head, int n, float* to) const {
        const int half = s.R / 2, used = up16(n);
        float angle[TILE];
        for (int r = 0; r < half; r++) {
            float *cosines = to + r * TILE, *sines_to = cosines + half * TILE;
            for (int i = 0; i < used; i++) angle[i] = i < n ? at(f, token + i, head, r) : 0;
            sines(used, angle, true, cosines), sines(used, angle, false, sines_to);
            memset(cosines + n, 0, sizeof(float) * (TILE - n)), memset(sines_to + n, 0, sizeof(float) * (TILE - n));
        }
    }
    // Gradients of n tokens' factors, or of the angles whose cosines and sines f they are, to rows `row` elements apart.
    void write_factors(int n, const float* f, const float* df, float* to, long row) const {
        if (!p.angles) {
            for (int a = 0; a < n; a++)
                for (int r = 0; r < s.R; r++) to[a * row + r] = df[r * TILE + a];
            return;
        }
        const int half = s.R / 2 * TILE;
        for (int a = 0; a < n; a++)
            for (int r = 0, c = a; c < half; r++, c += TILE) to[a * row + r] = f[c] * df[half + c] - f[half + c] * df[c];
    }
    float at(const View& x, long token, long head, long r) const {
        return ((const float*)x.data)[seq.batch * x.b + token * x.t + head * x.h + r * x.d];
    }

    // Sums of the decay within the tile and their exponentials; with a decay, query heads and key heads are the same.
    void load_decay(long token, int n) {
        double sum = 0;
        for (int i = 0; i < n; i++) {
            since[i] = sum += bounded(at(p.log_decay, token + i, g, 0));
        }
        for (int i = n; i < TILE; i++) since[i] = sum;
        for (int i = 0; i < TILE; i++) eq[i] = float(since[i]), ek[i] = float(sum - since[i]);
        exponentials(TILE, eq), exponentials(TILE, ek);
        all_decay = n ? eq[n - 1] : 1.0f;
    }

    // factors [R, TILE] times weight [TILE], into `factors`.
    const float* weighted(const float* f, const float* weight) {
        for (int r = 0; r < s.R; r++)
            for (int i = 0; i < TILE; i += W) store(factors + r * TILE + i, load(f + r * TILE + i) * load(weight + i));
        return factors;
    }

    void relu_rows(int n, float* x) const {
        for (int i = 0; i < n; i++)
            for (int c = 0; c < s.Kp; c += W) store(x + i * s.ldk + c, relu(load(x + i * s.ldk + c)));
    }

    // n keys and their values from `start` of the sequence on, and the keys' factors.
    void read_keys(long start, int n) {
        key_start = start, keys = n;
        const long token = seq.k0 + start;
        const uint8_t* mask = nullptr;
        if (p.key_mask) {
            for (int i = 0; i < keys; i++) real[i] = p.key_mask[seq.batch * p.mask_b + (token + i) * p.mask_t];
            mask = real;
        }
        load_rows(rows_of(p.k, seq.batch, token, g, p.bfloat16), keys, s.K, mask, kx, s.ldk, s.Kp);
        load_rows(rows_of(p.v, seq.batch, token, g, p.bfloat16), keys, s.V, mask, v, s.ldv, s.Vp);
        if (p.relu) relu_rows(keys, kx);
        if (p.leap)
            k_module.forward(s, keys, kx, kf);
        else
            load_factors(p.k_factors, token, g, keys, kf);
        if (mask)
            for (int i = 0; i < keys; i++)
                for (int r = 0; r < s.R && !mask[i]; r++) kf[r * TILE + i] = 0;
    }
    void load_keys(long m) {
        read_keys(m * TILE, int(least(seq.S - m * TILE, long(TILE))));
        if (p.log_decay.data) load_decay(seq.k0 + m * TILE, keys);
        features(s, keys, kx, p.log_decay.data ? weighted(kf, ek) : kf, phi_k);
    }

    void read_queries(long head, long i, int n) {
        const long token = seq.q0 + i;
        load_rows(rows_of(p.q, seq.batch, token, head, p.bfloat16), n, s.K, nullptr, qx, s.ldk, s.Kp);
        if (p.relu) relu_rows(n, qx);
        if (p.leap)
            q_module.forward(s, n, qx, qf);
        else
            load_factors(p.q_factors, token, head, n, qf);
    }
    void load_queries(long head, long i, int n) {
        read_queries(head, i, n);
        features(s, n, qx, p.log_decay.data ? weighted(qf, eq) : qf, phi_q);
    }

    // Which keys of the tile the queries see: seen [n], and for every key the first query that sees it.
    bool find_seen(long i, int n, long m) {
        for (int a = 0; a < n; a++) seen[a] = plan.seen(seq, i + a, m);
        for (int a = 0, j = 0; j < keys; j++) {
            while (a < n && seen[a] <= j) a++;
            first[j] = a, full[j] = n;
        }
        return n && seen[n - 1] > 0;
    }

    // exp(L_i - L_j) for all j of the tile; what lies behind i is never used.
    void decay_row(int i, float* row) const {
        for (int j = 0; j < TILE; j++) row[j] = float(since[i] - since[j]);
        exponentials(TILE, row);
    }

    template <int RANK>
    INLINE Vec sigma(const float* f, int i, int j) const {
        Vec sum{};
        for (int r = 0; r < (RANK ? RANK : s.R); r++) sum += splat(f[r * TILE + i]) * load(kf + r * TILE + j);
        return sum;
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    // scores -> weights, and row_sum += their sums.
    template <int RANK>
    void weigh(int n) {
        float decay[TILE];
        const int columns = up16(keys);
        for (int i = 0; i < n; i++) {
            Vec sum{};
            float* row = weights + i * s.ldc;
            if (p.log_decay.data) decay_row(i, decay);
            int j = 0;
            for (; j < seen[i]; j += W) {
                Vec weight = load(scores + i * s.ldc + j) * sigma<RANK>(qf, i, j);
                if (p.log_decay.data) weight *= load(decay + j);
                if (j + W > seen[i]) weight = keep(lanes_below(seen[i] - j), weight);
                sum += weight;
                store(row + j, weight);
            }
            for (; j < columns; j += W) store(row + j, Vec{});
            row_sum[i] += total(sum);
        }
    }
    void weigh_any(int n) {
        if (s.R == 1) return weigh<1>(n);
        if (s.R == 2) return weigh<2>(n);
        weigh<0>(n);
    }

    void attend(long head, long i, int n, long m) {
        load_queries(head, i, n);
        const bool band = find_seen(i, n, m);
        for (int a = 0; a < n; a++) row_sum[a] = empty ? 0 : dot(phi_q + a * s.ldf, z, s.Fp);
        if (!empty) product(n, s.Vp, s.F, by_rows(phi_q, s.ldf), S, s.ldv, nullptr, num, s.ldv);
        if (band) {
            product_left_of(n, s.K, by_rows(qx, s.ldk), kt, s.ldc, scores, s.ldc, seen);
            weigh_any(n);
            product(n, s.Vp, keys, by_rows(weights, s.ldc), v, s.ldv, empty ? nullptr : num, num, s.ldv, {nullptr, seen});
        } else if (empty)
            memset(num, 0, sizeof(float) * n * s.ldv);
        finish(head, i, n);
    }

    void finish(long head, long i, int n) {
        const long row = ((seq.batch * p.T + seq.q0 + i) * p.H + head);
        for (int a = 0; a < n; a++) {
            p.normaliser[row + a * p.H] = row_sum[a];
            if (!p.normalize) continue;
            const Vec divisor = splat(row_sum[a] < float(p.eps) ? float(p.eps) : row_sum[a]);
            for (int c = 0; c < s.Vp; c += W) store(num + a * s.ldv + c, load(num + a * s.ldv + c) / divisor);
        }
        store_rows(num, s.ldv, n, s.V, p.output + row * s.V * size(), p.H * s.V, p.bfloat16);
    }
    long size() const { return p.bfloat16 ? 2 : 4; }

    // The loaded key tile into the state.
    void absorb() {
        if (p.log_decay.data && !empty) {
            for (long i = 0; i < s.F; i++)
                for (int c = 0; c < s.Vp; c += W) store(S + i * s.ldv + c, load(S + i * s.ldv + c) * splat(all_decay));
            for (int c = 0; c < s.Fp; c += W) store(z + c, load(z + c) * splat(all_decay));
        }
        product(s.F, s.Vp, keys, by_columns(phi_k, s.ldf), v, s.ldv, S, S, s.ldv);
        add_rows(keys, s.Fp, phi_k, s.ldf, nullptr, z);
        empty = false;
    }

    // Whether the state after piece j is wanted before its queries are worked through.
    bool summed_first(long j, const Piece& piece) const {
        return p.pieces > 1 && (j + 1 < p.pieces || plan.begin(seq, seq.tiles()) < seq.T || !plan.has_queries(seq, piece));
    }

    // The state that piece j alone would make.
    void sum_keys(long, long j) {
        const Piece piece = plan.piece(seq, j);
        if (!summed_first(j, piece)) return;
        float decay = 1;
        read_state(nullptr, nullptr, S, z);
        for (long m = piece.first; m < piece.last; m++) {
            load_keys(m);
            absorb();
            if (p.log_decay.data) decay *= all_decay;
        }
        write_handed(S, z, decay, handed(j));
    }

    void hand_out_states(long, long) {
        read_given_state(p.kv, p.z, S, z);
        const long last = p.pieces - 1;
        for (long j = 0; j <= last; j++) {
            float *own = handed(j), *sums = handed(j, 1);
            const bool summed = summed_first(j, plan.piece(seq, j));
            if (summed) memcpy(sums, own, sizeof(float) * handed_size(s));
            write_handed(S, z, 1, own);
            if (summed) add_handed(sums, sums[s.state()], S, z);
            if (summed && j == last) write_final_state();
        }
    }

    void write_final_state() const { write_state(S, z, p.final_kv + state_row() * s.F * s.V, p.final_z + state_row() * s.F); }

    void forward(long, long j) {
        const Piece piece = plan.piece(seq, j);
        if (p.pieces == 1)
            read_given_state(p.kv, p.z, S, z);
        else
            read_handed(handed(j), S, z);
        if (p.pieces == 1 || plan.has_queries(seq, piece))
            for (long m = piece.first; m < piece.last; m++) tile_forward(m);
        if (j + 1 == p.pieces && !summed_first(j, piece)) write_final_state();
        if (piece.tail == piece.tail_end) return;
        if (p.pieces > 1) read_given_state(p.final_kv, p.final_z, S, z);
        keys = 0;
        queries_forward(seq.tiles(), piece.tail, piece.tail_end);
    }

    void tile_forward(long m) {
        const long begin = plan.begin(seq, m), end = plan.begin(seq, m + 1);
        load_keys(m);
        if (begin < end) transpose(kx, s.ldk, up16(keys), s.Kp, kt, s.ldc);
        if (m && m % SUPER == 0 && p.checkpoints) write_state(S, z, checkpoint(m), checkpoint(m) + long(s.F) * s.V);
        queries_forward(m, begin, end);
        absorb();
    }

    void queries_forward(long m, long begin, long end) {
        for_queries(m, begin, end, [&](long head, long i, int n) { attend(head, i, n, m); });
    }

    // ---- one token --------------------------------------------------------------------------------------------------

    // T = S = 1: the new state goes to final_kv and final_z, which may be kv and z themselves.
    void step(long, long) {
        load_keys(0);
        const float keeps = p.log_decay.data ? all_decay : 1.0f;
        const long at = state_row() * s.F;
        float *kv = p.final_kv + at * s.V, *z_new = p.final_z + at;
        for (int f = 0; f < s.F; f++) {
            const float *before = p.z ? p.kv + (at + f) * s.V : nullptr, add = phi_k[f];
            float* row = kv + long(f) * s.V;
            int c = 0;
            for (; c + W <= s.V; c += W)
                store(row + c, (before ? splat(keeps) * load(before + c) : Vec{}) + splat(add) * load(v + c));
            for (; c < s.V; c++) row[c] = (before ? keeps * before[c] : 0) + add * v[c];
            z_new[f] = (p.z ? keeps * p.z[at + f] : 0) + add;
        }
        for (long h = g * (p.H / p.G); h < (g + 1) * (p.H / p.G); h++) {
            if (p.leap) q_module.load_weights(s, p.q_leap, h);
            load_queries(h, 0, 1);
            features(s, 1, qx, qf, phi_q);  // the state has already decayed
            row_sum[0] = 0;
            for (int f = 0; f < s.F; f++) row_sum[0] += phi_q[f] * z_new[f];
            memset(num, 0, sizeof(float) * s.ldv);
            if (s.V == s.Vp)
                product(1, s.Vp, s.F, by_rows(phi_q, s.ldf), kv, s.V, nullptr, num, s.ldv);
            else
                for (int f = 0; f < s.F; f++)
                    for (int c = 0; c < s.V; c++) num[c] += phi_q[f] * kv[long(f) * s.V + c];
            finish(h, 0, 1);
        }
    }

    // ---- backward ---------------------------------------------------------------------------------------------------

    float* state_of(long slot) const { return super + slot * (long(s.Vp) * s.ldf + s.ldf); }
    float* z_of(long slot) const { return state_of(slot) + long(s.Vp) * s.ldf; }

    // S^T and z at the start of every key tile from `begin` to `end` - 1.
    void states(long begin, long end) {
        if (begin == 0)
            read_given_state(p.kv, p.z, S, z);
        else
            read_state(checkpoint(begin), checkpoint(begin) + long(s.F) * s.V, S, z);
        transpose(S, s.ldv, s.Fp, s.Vp, state_of(0), s.ldf);
        memcpy(z_of(0), z, sizeof(float) * s.ldf);
        for (long m = begin; m + 1 < end; m++) {
            load_keys(m);
            float *from = state_of(m - begin), *to = state_of(m - begin + 1);
            if (p.log_decay.data) {
                for (long i = 0; i < long(s.V) * s.ldf; i += W) store(to + i, load(from + i) * splat(all_decay));
                for (int c = 0; c < s.Fp; c += W) store(z + c, load(z + c) * splat(all_decay));
                from = to;
            }
            product(s.V, s.Fp, keys, by_columns(v, s.ldv), phi_k, s.ldf, from, to, s.ldf);
            add_rows(keys, s.Fp, phi_k, s.ldf, nullptr, z);
            memcpy(z_of(m - begin + 1), z, sizeof(float) * s.ldf);
        }
    }

    // g and d of n queries.
    void load_grad(long head, long i, int n) {
        const long token = seq.q0 + i, row = (seq.batch * p.T + token) * p.H + head;
        load_rows(rows_of(p.grad, seq.batch, token, head, p.bfloat16), n, s.V, nullptr, gn, s.ldv, s.Vp);
        for (int a = 0; a < n; a++) gd[a] = 0;
        if (!p.normalize) return;
        const Rows out{p.output + row * s.V * size(), long(p.H) * s.V, 1, bool(p.bfloat16)};
        load_rows(out, n, s.V, nullptr, num, s.ldv, s.Vp);
        for (int a = 0; a < n; a++) {
            const float normaliser = p.normaliser[row + a * p.H];
            const bool open = normaliser >= float(p.eps);
            const Vec divisor = splat(open ? normaliser : float(p.eps));
            for (int c = 0; c < s.Vp; c += W) store(gn + a * s.ldv + c, load(gn + a * s.ldv + c) / divisor);
            if (open) gd[a] = -dot(gn + a * s.ldv, num + a * s.ldv, s.Vp);
        }
    }

    // scores and dA (in `weights`) -> A (in `scores`) and dA sigma (in `weights`); gradients of factors and decay.
    template <int RANK>
    void weigh_backward(int n) {
        float decay[TILE];
        const int columns = up16(keys);
        for (int i = 0; i < n; i++) {
            float *score_row = scores + i * s.ldc, *row = weights + i * s.ldc;
            Vec sums[RANK ? RANK : 1] = {}, decay_sum{};
            if (!RANK)
                for (int r = 0; r < s.R; r++) factors[r] = 0;
            if (p.log_decay.data) decay_row(i, decay);
            int j = 0;
            for (; j < seen[i]; j += W) {
                Vec score = load(score_row + j), grad = load(row + j) + splat(gd[i]);
                if (j + W > seen[i]) {
                    const Int mask = lanes_below(seen[i] - j);
                    score = keep(mask, score), grad = keep(mask, grad);
                }
                if (p.log_decay.data) {
                    const Vec kept = load(decay + j);
                    score *= j + W > seen[i] ? keep(lanes_below(seen[i] - j), kept) : kept;
                }
                const Vec both = sigma<RANK>(qf, i, j), product_grad = grad * score;
                for (int r = 0; r < (RANK ? RANK : s.R); r++) {
                    const Vec share = product_grad * load(kf + r * TILE + j);
                    if (RANK)
                        sums[RANK ? r : 0] += share;
                    else
                        factors[r] += total(share);
                    store(dkf + r * TILE + j, load(dkf + r * TILE + j) + product_grad * splat(qf[r * TILE + i]));
                }
                if (p.log_decay.data) {
                    Vec moved = product_grad * both;  // a pair of a token with itself doesn't decay
                    if (j + W > i) moved = keep(lanes_below(i - j), moved);
                    decay_sum += moved;
                    store(column_sum + j, load(column_sum + j) + moved);
                    Vec kept = load(decay + j);
                    if (j + W > seen[i]) kept = keep(lanes_below(seen[i] - j), kept);
                    grad *= kept;
                }
                store(score_row + j, score * both);
                store(row + j, grad * both);
            }
            for (; j < columns; j += W) store(score_row + j, Vec{}), store(row + j, Vec{});
            for (int r = 0; r < (RANK ? RANK : s.R); r++) dqf[r * TILE + i] += RANK ? total(sums[RANK ? r : 0]) : factors[r];
            if (p.log_decay.data) row_sum[i] += total(decay_sum);
        }
    }
    void weigh_backward_any(int n) {
        if (s.R == 1) return weigh_backward<1>(n);
        if (s.R == 2) return weigh_backward<2>(n);
        weigh_backward<0>(n);
    }

    // The part of dx and df that comes through the features: x, f and dphi + d z -> += dx [n, ldk], += df.
    // `extra` adds extra_weight[i] extra[c] to row i of dphi; `weight` scales the factors' gradient (decay). With `first`, dx
    // and df hold nothing yet.
    void features_backward(
        int n, const float* x, const float* f, const float* dphi, const float* extra, const float* extra_weight,
        const float* weight, float* dx, float* df, float* decay_part, bool first = false
    ) {
        for (int i = 0; i < n; i++) {
            float along = 0;
            for (int r = 0; r < s.R; r++) {
                const float own = f[r * TILE + i] * (weight ? weight[i] : 1.0f);
                const Vec factor = splat(own), add = splat(extra_weight ? extra_weight[i] : 1.0f);
                const float *grad = dphi + i * s.ldf + r * s.K, *more = extra + r * s.K;
                Vec sum{};
                for (int c = 0; c < s.Kp; c += W) {
                    const Vec both = load(grad + c) + add * load(more + c);
                    sum += load(x + i * s.ldk + c) * both;
                    store(dx + i * s.ldk + c, first && r == 0 ? factor * both : load(dx + i * s.ldk + c) + factor * both);
                }
                const float share = total(sum), weighted = share * (weight ? weight[i] : 1.0f);
                df[r * TILE + i] = first ? weighted : df[r * TILE + i] + weighted;
                along += share * own;
            }
            if (decay_part) decay_part[i] = along;
        }
    }

    // One tile of queries against the state at the start of tile m and the keys of tile m.
    void attend_backward(long head, long i, int n, long m, const float* St_here, const float* z_here, float* module_gradient) {
        load_queries(head, i, n);
        load_grad(head, i, n);
        const bool band = find_seen(i, n, m);
        memset(dqf, 0, sizeof(float) * s.R * TILE);
        product(n, s.Fp, s.V, by_rows(gn, s.ldv), St_here, s.ldf, nullptr, dphi_q, s.ldf);
        if (band) {
            product_left_of(n, s.K, by_rows(qx, s.ldk), kt, s.ldc, scores, s.ldc, seen);
            product_left_of(n, s.V, by_rows(gn, s.ldv), vt, s.ldc, weights, s.ldc, seen);
            weigh_backward_any(n);
            product(n, s.Kp, keys, by_rows(weights, s.ldc), kx, s.ldk, nullptr, dxq, s.ldk, {nullptr, seen});
            product(keys, s.Kp, n, by_columns(weights, s.ldc), qx, s.ldk, dxk, dxk, s.ldk, {first, full});
            product(keys, s.Vp, n, by_columns(scores, s.ldc), gn, s.ldv, dv, dv, s.ldv, {first, full});
        } else
            memset(dxq, 0, sizeof(float) * n * s.ldk);
        const float* decay = p.log_decay.data ? eq : nullptr;
        features_backward(n, qx, qf, dphi_q, z_here, gd, decay, dxq, dqf, decay ? ek : nullptr);
        gather_state_gradient(n);
        write_query_gradients(head, i, n, module_gradient);
    }
    void gather_state_gradient(int n) {
        product(s.F, s.Vp, n, by_columns(phi_q, s.ldf), gn, s.ldv, dS, dS, s.ldv);
        add_rows(n, s.Fp, phi_q, s.ldf, gd, dz);
    }

    void write_query_gradients(long head, long i, int n, float* module_gradient) {
        const long row = (seq.batch * p.T + seq.q0 + i) * p.H + head;
        if (p.leap)
            q_module.backward(s, n, qx, qf, dqf, dxq, module_gradient);
        else if (p.dq_factors)
            write_factors(n, qf, dqf, p.dq_factors + row * factor_width(), p.H * factor_width());
        if (p.relu) through_relu(n, qx, dxq);
        store_rows(dxq, s.ldk, n, s.K, p.dq + row * s.K * size(), p.H * s.K, p.bfloat16);
    }
    void through_relu(int n, const float* x, float* grad) const {
        for (int i = 0; i < n; i++)
            for (int c = 0; c < s.Kp; c += W)
                store(grad + i * s.ldk + c, keep(load(x + i * s.ldk + c) > Vec{}, load(grad + i * s.ldk + c)));
    }

    // What the loaded keys get through the state after them.
    void absorb_backward() {
        transpose(dS, s.ldv, s.Fp, s.Vp, dSt, s.ldf);
        memset(dkf, 0, sizeof(float) * s.R * TILE);
        memset(dxk, 0, sizeof(float) * up16(keys) * s.ldk);
        product(keys, s.Vp, s.F, by_rows(phi_k, s.ldf), dS, s.ldv, nullptr, dv, s.ldv);
        product(keys, s.Fp, s.V, by_rows(v, s.ldv), dSt, s.ldf, nullptr, dphi_k, s.ldf);
        features_backward(
            keys, kx, kf, dphi_k, dz, nullptr, p.log_decay.data ? ek : nullptr, dxk, dkf, p.log_decay.data ? column_sum : nullptr
        );
    }

    void write_key_gradients(float* module_gradient) {
        const long row = (seq.batch * p.S + seq.k0 + key_start) * p.G + g;
        if (p.leap)
            k_module.backward(s, keys, kx, kf, dkf, dxk, module_gradient);
        else if (p.dk_factors)
            write_factors(keys, kf, dkf, p.dk_factors + row * factor_width(), p.G * factor_width());
        if (p.relu) through_relu(keys, kx, dxk);
        store_rows(dxk, s.ldk, keys, s.K, p.dk + row * s.K * size(), p.G * s.K, p.bfloat16);
        store_rows(dv, s.ldv, keys, s.V, p.dv + row * s.V * size(), p.G * s.V, p.bfloat16);
    }

    // What the queries of piece j alone would add to the gradient of the state before it, and those behind all keys.
    void sum_queries(long slot, long j) {
        const Piece piece = plan.piece(seq, j);
        memset(dS, 0, sizeof(float) * s.Fp * s.ldv), memset(dz, 0, sizeof(float) * s.ldf);
        tail_backward(slot, piece);
        write_handed(dS, dz, 1, handed(j, 1));
        memset(dS, 0, sizeof(float) * s.Fp * s.ldv), memset(dz, 0, sizeof(float) * s.ldf);
        float decay = 1;
        for (long m = piece.last - 1; j && m >= piece.first; m--) {
            if (p.log_decay.data) {
                load_decay(seq.k0 + m * TILE, int(least(seq.S - m * TILE, long(TILE))));
                decay_gradient_state();
                decay *= all_decay;
            }
            for_queries(m, plan.begin(seq, m), plan.begin(seq, m + 1), [&](long head, long i, int n) {
                load_queries(head, i, n);
                load_grad(head, i, n);
                gather_state_gradient(n);
            });
        }
        write_handed(dS, dz, decay, handed(j));
    }

    void hand_out_gradients(long, long) {
        read_given_state(p.grad_kv, p.grad_z, dS, dz);
        for (long j = 0; j < p.pieces; j++) add_handed(handed(j, 1), 1, dS, dz);
        for (long j = p.pieces - 1; j >= 0; j--) {
            float *own = handed(j), *sums = handed(j, 1);
            memcpy(sums, own, sizeof(float) * handed_size(s));
            write_handed(dS, dz, 1, own);
            add_handed(sums, sums[s.state()], dS, dz);
        }
    }

    void backward(long slot, long j) {
        const Piece piece = plan.piece(seq, j);
        if (p.pieces == 1) {
            read_given_state(p.grad_kv, p.grad_z, dS, dz);
            tail_backward(slot, piece);
        } else
            read_handed(handed(j), dS, dz);
        for (long end = piece.last; end > piece.first;) {
            const long begin = (end - 1) / SUPER * SUPER;
            if (plan.begin(seq, begin) < plan.begin(seq, end)) states(begin, end);
            for (long m = end - 1; m >= begin; m--) tile_backward(m, slot, state_of(m - begin), z_of(m - begin));
            end = begin;
        }
        if (p.dz && j == 0) write_state(dS, dz, p.dkv + state_row() * s.F * s.V, p.dz + state_row() * s.F);
    }

    void tail_backward(long slot, const Piece& piece) {
        if (piece.tail == piece.tail_end) return;
        read_given_state(p.final_kv, p.final_z, S, z);
        transpose(S, s.ldv, s.Fp, s.Vp, state_of(0), s.ldf);
        keys = 0;
        queries_backward(seq.tiles(), piece.tail, piece.tail_end, slot, state_of(0), z);
    }

    // The queries of tile m from `begin` to `end`, head by head and tile by tile: work(head, i, n).
    template <class Do>
    void for_queries(long m, long begin, long end, Do work) {
        const long group = p.H / p.G;
        for (long h = g * group; begin < end && h < (g + 1) * group; h++) {
            if (p.leap) q_module.load_weights(s, p.q_leap, h);
            for (long i = begin; i < end;) {
                const int n = plan.together(seq, i, end, m);
                work(h, i, n);
                i += n;
            }
        }
    }

    void tile_backward(long m, long slot, const float* St_here, const float* z_here) {
        const long begin = plan.begin(seq, m), end = plan.begin(seq, m + 1);
        const bool queries = begin < end;
        load_keys(m);
        absorb_backward();
        if (queries) {
            transpose(kx, s.ldk, up16(keys), s.Kp, kt, s.ldc);
            transpose(v, s.ldv, up16(keys), s.Vp, vt, s.ldc);
        }
        if (p.log_decay.data) decay_backward_begin(St_here, z_here);
        if (queries) queries_backward(m, begin, end, slot, St_here, z_here);
        if (p.log_decay.data) decay_backward_end(m);
        write_key_gradients(p.leap ? p.k_leap.gradient + (slot * p.G + g) * gradient_size(p.k_leap, s.K) : nullptr);
    }

    void queries_backward(long m, long begin, long end, long slot, const float* St_here, const float* z_here) {
        for_queries(m, begin, end, [&](long head, long i, int n) {
            float* gradient = p.leap ? p.q_leap.gradient + (slot * p.H + head) * gradient_size(p.q_leap, s.K) : nullptr;
            attend_backward(head, i, n, m, St_here, z_here, gradient);
        });
    }

    // ---- gradient of the decay --------------------------------------------------------------------------------------
    //
    // log_decay[t] stands in the exponent of every pair j < t <= i: of keys in the tile before t with queries from t on; of
    // the state with queries from t on; of keys before t with the state after the tile; and of the old state with the new.

    float carried;              // exp(L_end) S . dS of the old state with the new
    float from_keys[TILE];      // of each key with the state after the tile

    void decay_backward_begin(const float* St_here, const float* z_here) {
        double sum = 0;
        for (int c = 0; c < s.V; c++) sum += dot(St_here + long(c) * s.ldf, dSt + long(c) * s.ldf, s.Fp);
        carried = float(sum + dot(z_here, dz, s.Fp)) * all_decay;
        for (int i = 0; i < TILE; i++) from_keys[i] = i < keys ? column_sum[i] : 0, column_sum[i] = row_sum[i] = 0;
        decay_gradient_state();
    }
    void decay_gradient_state() {
        for (long i = 0; i < s.F; i++)
            for (int c = 0; c < s.Vp; c += W) store(dS + i * s.ldv + c, load(dS + i * s.ldv + c) * splat(all_decay));
        for (int c = 0; c < s.Fp; c += W) store(dz + c, load(dz + c) * splat(all_decay));
    }

    // After attend_backward: ek holds, for each query, its share of the state's part.
    void decay_backward_end(long m) {
        const long row = (seq.batch * p.T + seq.q0 + m * TILE) * p.H + g;
        double later = 0, earlier = 0;
        for (int i = 0; i < keys; i++) earlier += from_keys[i];
        for (int i = keys - 1; i >= 0; i--) {
            later += double(ek[i]) + row_sum[i] - column_sum[i];
            earlier -= from_keys[i];
            // The keys before t: their pairs with later queries are in `later` by row and by column.
            if (p.dlog_decay) p.dlog_decay[row + i * p.H] = float(later + earlier + carried);
        }
    }
};
