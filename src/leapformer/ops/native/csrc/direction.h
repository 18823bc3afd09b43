// What is left of a key at a query, in one direction of a decay, over one tile.
#pragma once

#include "tile.h"

// A step of the decay that leaves exactly 0, as -inf does. Differences of sums that held anything further off would be lost.
constexpr float LEAST_STEP = -200;

inline float bounded(float step) { return step < LEAST_STEP ? LEAST_STEP : step; }

inline void exponentials(int n, float* x) {
    for (int i = 0; i < n; i += W) store(x + i, exponential(load(x + i)));
}

// Key j reaches query i of the tile with exp(sum[i] - sum[j]). Query i reads the state that comes into the tile with query[i],
// key j goes into the one that leaves it with key[j], and `whole` is what the tile leaves of a state.
//
// Exponentials are taken of neighbours alone. To or from a token beyond the own block of 16 it is `near`, from query i to
// that block's edge, times `far`, from the edge to key j: neither exponent is positive, so nothing is lost but what is 0.
struct Direction {
    static constexpr int BLOCK = 16, BLOCKS = TILE / BLOCK;
    double sum[TILE];
    float query[TILE], key[TILE], whole;
    float near[TILE], far[BLOCKS][TILE];

    // Earlier keys: the state is multiplied by exp(step) before the token's own key is added.
    template <class Step>
    void load_earlier(int n, Step step) {
        double total = 0;
        for (int i = 0; i < n; i++) sum[i] = total += bounded(step(i));
        close(n, total, [&](int i) { return sum[i]; }, [&](int i) { return total - sum[i]; }, total);
    }
    // Later keys: the state is multiplied by exp(step) behind the token, on its way to it.
    template <class Step>
    void load_later(int n, Step step) {
        double total = 0;
        for (int i = 0; i < n; i++) sum[i] = -total, total += bounded(step(i));
        close(n, -total, [&](int i) { return total + sum[i]; }, [&](int i) { return -sum[i]; }, total);
    }

    // near and far, `earlier` or later; what reaches into a block comes over its near edge.
    void load_tables(int n, bool earlier) {
        const int blocks = up16(n) / BLOCK;
        for (int b = earlier ? 1 : 0; b < blocks - (earlier ? 0 : 1); b++) {
            const int low = b * BLOCK, high = low + BLOCK, begin = earlier ? 0 : high, end = earlier ? low : blocks * BLOCK;
            const double edge = sum[earlier ? low - 1 : high];
            for (int i = low; i < high; i++) near[i] = float(sum[i] - edge);
            for (int j = begin; j < end; j++) far[b][j] = float(edge - sum[j]);
            exponentials(BLOCK, near + low), exponentials(end - begin, far[b] + begin);
        }
    }

   private:
    template <class Query, class Key>
    void close(int n, double last, Query of_query, Key of_key, double total) {
        for (int i = n; i < up16(n); i++) sum[i] = last;
        for (int i = 0; i < up16(n); i++) query[i] = float(of_query(i)), key[i] = float(of_key(i));
        exponentials(up16(n), query), exponentials(up16(n), key);
        float all[W] = {float(total)};
        exponentials(1, all);
        whole = all[0];
    }
};
