// All kernels for one instruction set. The build compiles this file once for each, with LEAPFORMER_ISA as its name.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "interface.h"

#define LEAPFORMER_NAME_(x) #x
#define LEAPFORMER_NAME(x) LEAPFORMER_NAME_(x)
#define LEAPFORMER_TABLE_(x) kernels_##x
#define LEAPFORMER_TABLE(x) LEAPFORMER_TABLE_(x)

// Nothing in here may have a name that another instruction set's copy shares: the linker would keep only one.
namespace {

#include "attention.h"

typedef void (Attention::*Pass)(long slot, long piece);

struct Context {
    const Problem& p;
    const Plan& plan;
    Pass pass;
    long pieces;
    bool backward;
    float* between;
};

void work(const void* context, int64_t slot, float* memory) {
    const Context& c = *(const Context*)context;
    Attention attention(c.plan, memory, c.backward, c.between);
    for (long item = slot; item < c.p.N * c.p.G * c.pieces; item += c.p.slots) {
        const long unit = item / c.pieces;
        attention.start(unit / c.p.G, unit % c.p.G);
        (attention.*c.pass)(slot, item % c.pieces);
    }
}

// `sum` and `hand_out` make the states that the pieces of a sequence start from; a sequence in one piece needs neither.
bool run(const Problem& p, Pass sum, Pass hand_out, Pass pass, bool backward) {
    const Plan plan(p);
    if (!plan.complete) return false;
    const Shape shape(p);
    Buffers sizes;
    const long floats = sizes.place(nullptr, p, shape, backward);
    Context context{p, plan, pass, p.pieces, backward, nullptr};
    auto run_pass = [&](Pass which, long pieces) {
        context.pass = which, context.pieces = pieces;
        return run_parallel(p.threads, p.slots, work, &context, floats);
    };
    if (p.pieces == 1) return run_pass(pass, 1);
    context.between = (float*)allocate(sizeof(float) * p.N * p.G * p.pieces * 2 * handed_size(shape));
    const bool done = context.between && run_pass(sum, p.pieces) && run_pass(hand_out, 1) && run_pass(pass, p.pieces);
    free(context.between);
    return done;
}

bool forward(const Problem* p) {
    return run(*p, &Attention::sum_keys, &Attention::hand_out_states, &Attention::forward, false);
}
bool backward(const Problem* p) {
    return run(*p, &Attention::sum_queries, &Attention::hand_out_gradients, &Attention::backward, true);
}
bool step(const Problem* p) { return run(*p, nullptr, nullptr, &Attention::step, false); }

}  // namespace

extern const Kernels LEAPFORMER_TABLE(LEAPFORMER_ISA);
const Kernels LEAPFORMER_TABLE(LEAPFORMER_ISA) = {LEAPFORMER_NAME(LEAPFORMER_ISA), forward, backward, step};
