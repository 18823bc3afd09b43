// Tiles of 64 tokens: what lies where in a thread's memory, and how rows come in from and go out to the tensors.
#pragma once

#include "interface.h"
#include "product.h"

constexpr int TILE = 64;

inline int least(int a, int b) { return a < b ? a : b; }
inline long least(long a, long b) { return a < b ? a : b; }
inline int up16(int n) { return (n + 15) / 16 * 16; }

// Distance between two rows of a buffer; never a multiple of 128 bytes, so that columns spread over the cache's sets.
inline int row_stride(int width) { return width % 32 ? width : width + 16; }

INLINE float from_bfloat16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rows of one head: address of the first, strides in elements.
struct Rows {
    const char* data;
    long token, element;
    bool bfloat16;
};

INLINE Rows rows_of(const View& x, long batch, long token, long head, bool bfloat16) {
    const long offset = batch * x.b + token * x.t + head * x.h;
    return {x.data + offset * (bfloat16 ? 2 : 4), long(x.t), long(x.d), bfloat16};
}

// n rows of `width` into to[n rounded up to 16, columns], with zeros where there is nothing or `real` says 0.
inline void load_rows(const Rows& x, int n, int width, const uint8_t* real, float* to, int ld, int columns) {
    for (int i = 0; i < n; i++) {
        float* row = to + i * ld;
        int done = 0;
        if (real && !real[i]) {
        } else if (x.bfloat16) {
            const uint16_t* from = (const uint16_t*)x.data + i * x.token;
            if (x.element == 1)
                for (; done < width; done++) row[done] = from_bfloat16(from[done]);
            for (; done < width; done++) row[done] = from_bfloat16(from[done * x.element]);
        } else {
            const float* from = (const float*)x.data + i * x.token;
            if (x.element == 1)
                for (; done + W <= width; done += W) store(row + done, load(from + done));
            for (; done < width; done++) row[done] = from[done * x.element];
        }
        for (; done < columns; done++) row[done] = 0;
    }
    for (int i = n; i < up16(n); i++) memset(to + i * ld, 0, columns * sizeof(float));
}

// n rows of `width` from a tile to a contiguous tensor whose rows lie `token` elements apart.
inline void store_rows(const float* from, int ld, int n, int width, char* to, long token, bool bfloat16) {
    for (int i = 0; i < n; i++) {
        const float* row = from + i * ld;
        if (bfloat16) {
            uint16_t* out = (uint16_t*)to + i * token;
            for (int j = 0; j < width; j++) out[j] = to_bfloat16(row[j]);
        } else {
            float* out = (float*)to + i * token;
            int j = 0;
            for (; j + W <= width; j += W) store(out + j, load(row + j));
            for (; j < width; j++) out[j] = row[j];
        }
    }
}

// The widths of a problem, as the buffers have them.
struct Shape {
    int K, V, R, F;           // F = R K, the width of the features
    int Kp, Vp, Fp;           // rounded up to 16; Fp holds R - 1 times K and then Kp
    int ldk, ldv, ldf, ldc;   // row strides; ldc of a tile of scores
    int hidden, hidden_p, ldh;  // units of the wider LeaP module

    explicit Shape(const Problem& p) {
        K = int(p.K), V = int(p.V), R = int(p.R), F = R * K;
        Kp = up16(K), Vp = up16(V), Fp = up16((R - 1) * K + Kp);
        ldk = row_stride(Kp), ldv = row_stride(Vp), ldf = row_stride(Fp), ldc = row_stride(TILE);
        hidden = int(p.q_leap.hidden > p.k_leap.hidden ? p.q_leap.hidden : p.k_leap.hidden);
        hidden_p = up16(hidden), ldh = row_stride(hidden_p);
    }
    long state() const { return long(F) * V + F; }  // floats of a state: kv, then z
};

// Hands out pieces of one block of memory; without a block it only counts. AddressSanitizer gets a gap behind each piece.
struct Arena {
    float* memory;
    long used = 0;

    float* take(long floats) {
        float* piece = memory ? memory + used : nullptr;
        used += (floats + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)
        if (memory) {
            __asan_unpoison_memory_region(piece, sizeof(float) * floats);
            __asan_poison_memory_region(piece + floats, sizeof(float) * (memory + used + GAP - piece - floats));
        }
        used += GAP;
#endif
        return piece;
    }
    static constexpr long GAP = 64;
};

// phi[i, r K + c] = factors[r][i] x[i, c], zeros behind.
inline void features(const Shape& s, int n, const float* x, const float* factors, float* phi) {
    for (int i = 0; i < n; i++) {
        float* row = phi + i * s.ldf;
        for (int r = 0; r < s.R; r++) {
            const Vec factor = splat(factors[r * TILE + i]);
            for (int c = 0; c < s.Kp; c += W) store(row + r * s.K + c, factor * load(x + i * s.ldk + c));
        }
        for (int c = (s.R - 1) * s.K + s.Kp; c < s.Fp; c++) row[c] = 0;
    }
}

// z[c] += sum over n rows of weight[i] x[i, c]; weight null: 1.
inline void add_rows(int n, int columns, const float* x, int ld, const float* weight, float* z) {
    for (int c = 0; c < columns; c += W) {
        Vec sum{};
        for (int i = 0; i < n; i++) {
            const Vec row = load(x + i * ld + c);
            sum += weight ? splat(weight[i]) * row : row;
        }
        store(z + c, load(z + c) + sum);
    }
}

INLINE float dot(const float* a, const float* b, int columns) {
    Vec sum{};
    for (int c = 0; c < columns; c += W) sum += load(a + c) * load(b + c);
    return total(sum);
}
