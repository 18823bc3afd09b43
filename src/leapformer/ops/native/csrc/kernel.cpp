// All kernels for one instruction set. The build compiles this file once for each, with LEAPFORMER_ISA as its name.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdlib.h>

#include "interface.h"

#define LEAPFORMER_NAME_(x) #x
#define LEAPFORMER_NAME(x) LEAPFORMER_NAME_(x)
#define LEAPFORMER_TABLE_(x) kernels_##x
#define LEAPFORMER_TABLE(x) LEAPFORMER_TABLE_(x)

// Nothing in here may have a name that another instruction set's copy shares: the linker would keep only one.
namespace {

#include "attention.h"

struct Context {
    const Problem& p;
    const Plan& plan;
    void (Attention::*pass)(long slot);
    bool backward;
};

void work(const void* context, int64_t slot, float* memory) {
    const Context& c = *(const Context*)context;
    Attention attention(c.plan, memory, c.backward);
    for (long unit = slot; unit < c.p.N * c.p.G; unit += c.p.slots) {
        attention.start(unit / c.p.G, unit % c.p.G);
        (attention.*c.pass)(slot);
    }
}

void run(const Problem& p, void (Attention::*pass)(long), bool backward) {
    const Plan plan(p);
    const Shape shape(p);
    Buffers sizes;
    const long floats = sizes.place(nullptr, p, shape, backward);
    const Context context{p, plan, pass, backward};
    run_parallel(p.threads, p.slots, work, &context, floats);
}

void forward(const Problem* p) { run(*p, &Attention::forward, false); }
void backward(const Problem* p) { run(*p, &Attention::backward, true); }
void step(const Problem* p) { run(*p, &Attention::step, false); }

}  // namespace

extern const Kernels LEAPFORMER_TABLE(LEAPFORMER_ISA);
const Kernels LEAPFORMER_TABLE(LEAPFORMER_ISA) = {LEAPFORMER_NAME(LEAPFORMER_ISA), forward, backward, step};
