// The C interface of the kernels: one problem as plain numbers, filled in by Python (native/problem.py, same order).
//
// Letters: B batch, N sequences (B, or those packed in one row), T queries, S keys, H query heads, G key/value heads,
// R rank of the re-weighting, K key width, V value width, r hidden units of a LeaP module. Every field is 8 bytes wide.
#pragma once

#include <cstdint>

// A tensor by its address and its strides in elements: [batch, token, head, width]. A null address: not given.
struct View {
    char* data;
    int64_t b, t, h, d;
};

// Weights of one LeaP module, float32 and contiguous: w1 [heads, r, K], b1 [heads, r], w2 [heads, r or K], b2 [heads].
// `gradient` [slots, H or G, r K + r + (r or K) + 1] collects one partial sum for each slot and head.
struct Leap {
    const float *w1, *b1, *w2, *b2;
    float* gradient;
    int64_t heads, hidden;
};

struct Problem {
    int64_t bfloat16;  // q, k, v, output, grad and the gradients of q, k and v: bfloat16, else float32; all else float32
    int64_t B, N, T, S, H, G, K, V, R;
    int64_t causal, all, normalize, leap, threads, slots, pieces;
    int64_t relu;    // of q and k; always with LeaP modules
    int64_t angles;  // in place of factors, R / 2 of them: the factors are their cosines, then their sines
    double eps;
    View q, k, v, q_factors, k_factors, log_decay, later_decay;
    const float *kv, *z;      // initial state [N, G, R, K, V] and [N, G, R, K]
    const uint8_t* key_mask;  // [B, S], 1 = real
    int64_t mask_b, mask_t;
    const int64_t* counts;  // [B or 1, T]: how many keys each query sees
    int64_t counts_b;
    const int64_t *cu_q, *cu_k;                                            // [N + 1] each, or null
    char* output;                                                          // [B, T, H, V]
    float *final_kv, *final_z;                                             // like kv and z
    float* normaliser;                                                     // [B, T, H], before the clamp
    float* checkpoints;                                                    // see Plan::checkpoint
    View grad;                                                             // of the output
    const float *grad_kv, *grad_z;                                         // of the final state
    char *dq, *dk, *dv;                                                    // contiguous, like q, k and v
    // [B, T, H, R] and [B, S, G, R], with angles R / 2; [B, T, H] twice; like kv and z.
    float *dq_factors, *dk_factors, *dlog_decay, *dlater_decay, *dkv, *dz;
    Leap q_leap, k_leap;
};

static_assert(sizeof(void*) == 8 && sizeof(double) == 8, "the fields of Problem are 8 bytes wide");

// One set of kernels, compiled for one instruction set. False: there was no memory, and the results are not all there.
struct Kernels {
    const char* name;
    bool (*forward)(const Problem*);
    bool (*backward)(const Problem*);
    bool (*step)(const Problem*);
};

// The one door to memory: null where there is none. No exception may leave a thread, which would end the process.
void* allocate(int64_t bytes);

// Runs `work` for every item on `threads` threads; each call gets `floats` floats of its thread's own memory. A thread that
// gets none leaves its share to the others; false where items are left because no thread got any.
typedef void (*Work)(const void* context, int64_t item, float* memory);
bool run_parallel(int64_t threads, int64_t items, Work work, const void* context, int64_t floats);

constexpr int64_t SUPER = 8;  // key tiles between two checkpoints of the state
