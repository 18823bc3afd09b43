// The LeaP module on a tile: P = sigmoid(w2 . relu(w1 x + b1) + b2), factors cos and sin of pi/2 P, and their gradient.
#pragma once

#include "tile.h"

constexpr float HALF_PI = 1.57079632679489662f;

// The weights of one head, laid out for the products.
struct Module {
    float *w1, *w1_t, *b1, *w2;  // w1 [hidden, ldk], w1_t [K, ldh], b1 and w2 padded with zeros
    float b2;
    float* hidden;       // [TILE, ldh]: relu(w1 x + b1)
    float* grad_hidden;  // [TILE, ldh]
    float* grad_w1;      // [hidden, ldk]
    float *proportion, *rest, *slope;  // P, 1 - P where it is too small to be seen in P, and the gradient of the score
    int units;  // 0 without a hidden layer

    void place(Arena& arena, const Shape& s) {
        w1 = arena.take(long(up16(s.hidden)) * s.ldk), w1_t = arena.take(long(s.Kp) * s.ldh);
        b1 = arena.take(s.ldh), w2 = arena.take(s.ldh > s.ldk ? s.ldh : s.ldk);
        hidden = arena.take(TILE * s.ldh), grad_hidden = arena.take(TILE * s.ldh);
        grad_w1 = arena.take(long(up16(s.hidden)) * s.ldk);
        proportion = arena.take(TILE), rest = arena.take(TILE), slope = arena.take(TILE);
    }

    void load_weights(const Shape& s, const Leap& leap, long head) {
        head = leap.heads == 1 ? 0 : head;
        units = int(leap.hidden);
        const int last = units ? units : s.K;
        b2 = leap.b2[head];
        memset(w2, 0, (s.ldh > s.ldk ? s.ldh : s.ldk) * sizeof(float));
        memcpy(w2, leap.w2 + head * last, last * sizeof(float));
        if (!units) return;
        memset(b1, 0, s.ldh * sizeof(float));
        memcpy(b1, leap.b1 + head * units, units * sizeof(float));
        const Rows rows{(const char*)(leap.w1 + head * units * s.K), s.K, 1, false};
        load_rows(rows, units, s.K, nullptr, w1, s.ldk, s.Kp);
        transpose(w1, s.ldk, up16(units), s.Kp, w1_t, s.ldh);
    }

    // x [n, K], already ReLU'd -> factors [2, TILE].
    void forward(const Shape& s, int n, const float* x, float* factors) {
        if (units) product(n, up16(units), s.K, by_rows(x, s.ldk), w1_t, s.ldh, nullptr, hidden, s.ldh);
        for (int i = 0; i < n; i++) {
            if (!units) {
                proportion[i] = dot(x + i * s.ldk, w2, s.Kp) + b2;
                continue;
            }
            Vec sum{};
            for (int c = 0; c < up16(units); c += W) {
                const Vec unit = relu(load(hidden + i * s.ldh + c) + load(b1 + c));
                store(hidden + i * s.ldh + c, unit);
                sum += unit * load(w2 + c);
            }
            proportion[i] = total(sum) + b2;
        }
        for (int i = n; i < TILE; i++) proportion[i] = 0;
        for (int i = 0; i < TILE; i += W) {
            const Vec e = exponential(-load(proportion + i)), whole = splat(1.0f) + e;
            const Vec p = splat(1.0f) / whole, left = e / whole;
            store(proportion + i, p), store(rest + i, left);
            // cos(pi/2 P) = sin(pi/2 (1 - P)) is never negative, and so no normaliser is.
            store(factors + i, sine(left * splat(HALF_PI)));
            store(factors + TILE + i, sine(p * splat(HALF_PI)));
        }
    }

    // After forward on the same tile: adds to grad_x [n, ldk] and to `gradient` (w1, b1, w2, b2 of this head).
    void backward(
        const Shape& s, int n, const float* x, const float* factors, const float* grad_factors, float* grad_x, float* gradient
    ) {
        for (int i = 0; i < TILE; i += W) {
            const Vec p = load(proportion + i), c = load(factors + i), sn = load(factors + TILE + i);
            const Vec grad_p = splat(HALF_PI) * (c * load(grad_factors + TILE + i) - sn * load(grad_factors + i));
            store(slope + i, grad_p * p * load(rest + i));
        }
        const int last = units ? units : s.K;
        float* grad_w2 = gradient + long(units) * s.K + units;
        for (int i = 0; i < n; i++) {
            const float a = slope[i];
            const float* unit = units ? hidden + i * s.ldh : x + i * s.ldk;
            for (int c = 0; c < last; c++) grad_w2[c] += a * unit[c];
            grad_w2[last] += a;
            for (int c = 0; c < (units ? up16(units) : s.Kp); c += W) {
                if (units)
                    store(grad_hidden + i * s.ldh + c, keep(load(unit + c) > Vec{}, splat(a) * load(w2 + c)));
                else
                    store(grad_x + i * s.ldk + c, load(grad_x + i * s.ldk + c) + splat(a) * load(w2 + c));
            }
        }
        if (!units) return;
        product(n, s.Kp, units, by_rows(grad_hidden, s.ldh), w1, s.ldk, grad_x, grad_x, s.ldk);
        product(units, s.Kp, n, by_columns(grad_hidden, s.ldh), x, s.ldk, nullptr, grad_w1, s.ldk);
        for (int u = 0; u < units; u++) {
            for (int c = 0; c < s.K; c++) gradient[u * s.K + c] += grad_w1[u * s.ldk + c];
            float sum = 0;
            for (int i = 0; i < n; i++) sum += grad_hidden[i * s.ldh + u];
            gradient[units * s.K + u] += sum;
        }
    }
};

inline long gradient_size(const Leap& leap, int K) {
    const long units = leap.hidden;
    return units * K + units + (units ? units : K) + 1;
}
