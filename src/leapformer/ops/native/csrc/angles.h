// Sines and cosines of angles of any size, for the factors of angles.
#pragma once

#include "tile.h"

// Beyond it float32 numbers are further than 1 apart, and the reduction in float64 would leave less than float32 can hold.
constexpr float LARGE_ANGLE = 16777216;

// to[i] = sin(x[i]), or cos(x[i]) = sin(x[i] + pi/2), for i < n <= TILE, n rounded up to W. The error is below 2^-22: what is
// added to `rest` in its sine is at most 0.65 and rounded five times, by 2^-24 of itself, and the sum of both once more.
inline void sines(int n, const float* x, bool cosine, float* to) {
    const double shift = cosine ? 0.5 : 0, pi = 3.14159265358979324, round = 6755399441055744.0;  // 1.5 * 2^52
    alignas(64) float rest[TILE];
    alignas(64) int32_t odd[TILE];
    bool large = false;
    n = (n + W - 1) / W * W;
    for (int i = 0; i < n; i++) {
        // The nearest multiple of pi, taken off in float64: no more than 2^-52 of the angle is lost.
        const double shifted = x[i] * (1 / pi) + shift + round;
        int64_t bits;
        memcpy(&bits, &shifted, 8);
        odd[i] = int32_t(uint32_t(bits) << 31);
        rest[i] = float(x[i] - (shifted - round - shift) * pi);
        large |= fabsf(x[i]) > LARGE_ANGLE;
    }
    for (int i = 0; i < n; i += W) {
        Int sign;
        memcpy(&sign, odd + i, sizeof(sign));
        store(to + i, (Vec)((Int)sine(load(rest + i)) ^ sign));
    }
    for (int i = 0; large && i < n; i++)
        if (fabsf(x[i]) > LARGE_ANGLE) to[i] = float(cosine ? std::cos(double(x[i])) : std::sin(double(x[i])));
}
