// Vectors of W floats through the compiler's vector extensions, for whatever instruction set this file is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 6, COLUMNS = 4;  // a register tile of a matrix product: ROWS x (COLUMNS vectors)
#elif defined(__AVX2__)
constexpr int W = 8, ROWS = 6, COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int W = 4, ROWS = 6, COLUMNS = 4;
#else
constexpr int W = 4, ROWS = 6, COLUMNS = 2;
#endif

#define INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t Int __attribute__((vector_size(W * 4)));
typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));

INLINE Vec load(const float* p) { return *(const Loose*)p; }
INLINE void store(float* p, Vec x) { *(Loose*)p = x; }
INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Vec select(Int mask, Vec x, Vec y) { return (Vec)((mask & (Int)x) | (~mask & (Int)y)); }
INLINE Vec keep(Int mask, Vec x) { return (Vec)(mask & (Int)x); }
INLINE Vec relu(Vec x) { return keep(~(x < Vec{}), x); }  // NaN stays NaN

// Lanes below n.
INLINE Int lanes_below(int n) {
    Int lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    return lane < (n - Int{});
}

// exp(x) for any x, to about 2 ulp; 0 below -87.
INLINE Vec exponential(Vec x) {
    const Int tiny = x < splat(-87.0f);
    x = select(tiny, splat(-87.0f), x);
    x = select(x > splat(88.0f), splat(88.0f), x);
    const Vec shifted = x * splat(1.44269504088896341f) + splat(12582912.0f);  // round to an integer in the low bits
    const Vec n = shifted - splat(12582912.0f);
    const Vec r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    Vec y = splat(1.0f / 5040) * r + splat(1.0f / 720);
    y = y * r + splat(1.0f / 120);
    y = y * r + splat(1.0f / 24);
    y = y * r + splat(1.0f / 6);
    y = y * r + splat(0.5f);
    y = y * r + splat(1.0f);
    y = y * r + splat(1.0f);
    const Int scale = (Int)shifted << 23;
    return keep(~tiny, (Vec)((Int)y + scale));
}

// Sine of x in [0, pi/2] by its series, to about 1 ulp.
INLINE Vec sine(Vec x) {
    const Vec y = x * x;
    Vec s = splat(1.6059044e-10f) * y + splat(-2.5052108e-8f);
    s = s * y + splat(2.7557319e-6f);
    s = s * y + splat(-1.9841270e-4f);
    s = s * y + splat(8.3333333e-3f);
    s = s * y + splat(-1.6666667e-1f);
    return s * y * x + x;
}

// ---- the sum of all lanes, and transposition of W x W blocks by log2(W) rounds of exchanging halves ------------------

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
    typedef Lanes<I...> type;
};

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

template <int s, int... l>
INLINE Vec plus_lanes_apart(Vec x, Lanes<l...>) {
    return x + SHUFFLE(x, x, (l ^ s)...);
}

INLINE float total(Vec x) {
    typedef typename CountLanes<W>::type All;
    if (W > 8) x = plus_lanes_apart<(W > 8 ? 8 : 1)>(x, All());
    if (W > 4) x = plus_lanes_apart<(W > 4 ? 4 : 1)>(x, All());
    x = plus_lanes_apart<2>(x, All());
    x = plus_lanes_apart<1>(x, All());
    return x[0];
}

template <int s, int... l>
INLINE void exchange(Vec& a, Vec& b, Lanes<l...>) {
    const Vec low = SHUFFLE(a, b, ((l & s) ? W + (l ^ s) : l)...);
    b = SHUFFLE(a, b, ((l & s) ? W + l : (l ^ s))...);
    a = low;
}

template <int s>
INLINE void exchange_all(Vec* rows) {
    for (int i = 0; i < W; i++)
        if (!(i & s)) exchange<s>(rows[i], rows[i + s], typename CountLanes<W>::type());
}

// to [columns, rows] = from [rows, columns]^T; both sides are written and read in whole blocks of W.
inline void transpose(const float* from, long from_ld, int rows, int columns, float* to, long to_ld) {
    for (int i = 0; i < rows; i += W)
        for (int j = 0; j < columns; j += W) {
            Vec block[W];
#pragma GCC unroll 16
            for (int n = 0; n < W; n++) block[n] = load(from + (i + n) * from_ld + j);
            exchange_all<1>(block);
            exchange_all<2>(block);
            if (W > 4) exchange_all<(W > 4 ? 4 : 1)>(block);
            if (W > 8) exchange_all<(W > 8 ? 8 : 1)>(block);
#pragma GCC unroll 16
            for (int n = 0; n < W; n++) store(to + (j + n) * to_ld + i, block[n]);
        }
}
