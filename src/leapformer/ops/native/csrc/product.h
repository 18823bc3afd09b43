// Matrix products of small matrices that lie in the cache, by register tiles.
#pragma once

#include "vector.h"

// C[MR, NV vectors] = (from ? keep from : 0) + sum over k in [0, steps) of A[i, k] B[k, :]. The sum starts from 0: added to a long
// sum one by one, its terms would lose what they lack in size.
template <int MR, int NV>
INLINE void register_tile(
    long steps, const float* a, long a_row, long a_step, const float* b, long b_ld, const float* from, float* c, long c_ld,
    float keep
) {
    Vec sum[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = Vec{};
    for (long k = 0; k < steps; k++, a += a_step, b += b_ld) {
        Vec right[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) right[j] = load(b + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            const Vec left = splat(a[i * a_row]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            store(c + i * c_ld + j * W, from ? splat(keep) * load(from + i * c_ld + j * W) + sum[i][j] : sum[i][j]);
}

template <int NV>
INLINE void register_rows(
    int rows, long steps, const float* a, long a_row, long a_step, const float* b, long b_ld, const float* from, float* c,
    long c_ld, float keep
) {
    switch (rows) {
        case 6: return register_tile<6, NV>(steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 5: return register_tile<5, NV>(steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 4: return register_tile<4, NV>(steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 3: return register_tile<3, NV>(steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 2: return register_tile<2, NV>(steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 1: return register_tile<1, NV>(steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
    }
}

inline void register_block(
    int vectors, int rows, long steps, const float* a, long a_row, long a_step, const float* b, long b_ld,
    const float* from, float* c, long c_ld, float keep = 1
) {
    switch (vectors) {
        case 1: return register_rows<1>(rows, steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 2: return register_rows<2>(rows, steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 3: return register_rows<COLUMNS < 3 ? 1 : 3>(rows, steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
        case 4: return register_rows<COLUMNS < 4 ? 1 : 4>(rows, steps, a, a_row, a_step, b, b_ld, from, c, c_ld, keep);
    }
}

// Rows of the next register tile, so that the last two are about equal.
INLINE int rows_of_tile(int left) { return left >= 2 * ROWS || left <= ROWS ? (left < ROWS ? left : ROWS) : (left + 1) / 2; }
INLINE int vectors_of_tile(int columns) { return columns / W < COLUMNS ? columns / W : COLUMNS; }

// A as rows (step 1 along k) or as columns (row 1).
struct Left {
    const float* data;
    long row, step;
};
INLINE Left by_rows(const float* data, long ld) { return {data, ld, 1}; }
INLINE Left by_columns(const float* data, long ld) { return {data, 1, ld}; }

// Row i takes k from first[i] up to last[i]; neither decreases with i. Null: all of k.
struct Range {
    const int *first = nullptr, *last = nullptr;
};

// C[M, N] = (from ? keep from : 0) + A[M, steps] B[steps, N], N a multiple of 16; `from` may be C itself.
inline void product(
    int M, int N, int steps, Left a, const float* b, long b_ld, const float* from, float* c, long c_ld, Range range = {},
    float keep = 1
) {
    for (int j = 0; j < N;) {
        const int vectors = vectors_of_tile(N - j);
        for (int i = 0; i < M;) {
            const int rows = rows_of_tile(M - i);
            const int begin = range.first ? range.first[i] : 0, end = range.last ? range.last[i + rows - 1] : steps;
            register_block(
                vectors, rows, end - begin, a.data + i * a.row + begin * a.step, a.row, a.step, b + begin * b_ld + j, b_ld,
                from ? from + i * c_ld + j : nullptr, c + i * c_ld + j, c_ld, keep
            );
            i += rows;
        }
        j += vectors * W;
    }
}

// C[M, N] = A[M, steps] B[steps, N], but only what lies left of column last[i] in row i (rounded up to 16 columns).
inline void product_left_of(
    int M, int steps, Left a, const float* b, long b_ld, float* c, long c_ld, const int* last
) {
    for (int i = 0; i < M;) {
        const int rows = rows_of_tile(M - i), N = (last[i + rows - 1] + 15) / 16 * 16;
        for (int j = 0; j < N;) {
            const int vectors = vectors_of_tile(N - j);
            register_block(
                vectors, rows, steps, a.data + i * a.row, a.row, a.step, b + j, b_ld, nullptr, c + i * c_ld + j, c_ld
            );
            j += vectors * W;
        }
        i += rows;
    }
}
