// All kernels for one instruction set. The build compiles this file once for each, with LEAPFORMER_ISA as its name.
#include <algorithm>
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
#include "two_sided.h"

// One pass over all items of work, each a piece of one sequence and key head: by Attention, or TwoSided.
template <class Form>
struct Context {
    typedef void (Form::*Pass)(long slot, long piece);
    const Problem& p;
    const Plan& plan;
    Pass pass;
    long pieces;
    bool backward;
    float* between;
};

template <class Form>
void work(const void* context, int64_t slot, float* memory) {
    const Context<Form>& c = *(const Context<Form>*)context;
    Form form(c.plan, memory, c.backward, c.between);
    for (long item = slot; item < c.p.N * c.p.G * c.pieces; item += c.p.slots) {
        const long unit = item / c.pieces;
        form.start(unit / c.p.G, unit % c.p.G);
        (form.*c.pass)(slot, item % c.pieces);
    }
}

// `sum` and `hand_out` make the states that the pieces of a sequence start from; a sequence in one piece needs neither.
template <class Form>
bool run(
    const Problem& p, typename Context<Form>::Pass sum, typename Context<Form>::Pass hand_out,
    typename Context<Form>::Pass pass, bool backward
) {
    const Plan plan(p);
    if (!plan.complete) return false;
    const Shape shape(p);
    const long floats = Form(plan, nullptr, backward, nullptr).floats;
    Context<Form> context{p, plan, pass, p.pieces, backward, nullptr};
    auto run_pass = [&](typename Context<Form>::Pass which, long pieces) {
        context.pass = which, context.pieces = pieces;
        return run_parallel(p.threads, p.slots, work<Form>, &context, floats);
    };
    if (p.pieces == 1) return run_pass(pass, 1);
    const long states = p.N * p.G * p.pieces * handed_states(p);
    context.between = (float*)allocate(sizeof(float) * states * handed_size(shape));
    const bool done = context.between && run_pass(sum, p.pieces) && run_pass(hand_out, 1) && run_pass(pass, p.pieces);
    free(context.between);
    return done;
}

template <class Form>
bool forward_of(const Problem& p) {
    return run<Form>(p, &Form::sum_keys, &Form::hand_out_states, &Form::forward, false);
}
template <class Form>
bool backward_of(const Problem& p) {
    return run<Form>(p, &Form::sum_queries, &Form::hand_out_gradients, &Form::backward, true);
}

bool forward(const Problem* p) { return p->later_decay.data ? forward_of<TwoSided>(*p) : forward_of<Attention>(*p); }
bool backward(const Problem* p) { return p->later_decay.data ? backward_of<TwoSided>(*p) : backward_of<Attention>(*p); }
bool step(const Problem* p) { return run<Attention>(*p, nullptr, nullptr, &Attention::step, false); }

}  // namespace

extern const Kernels LEAPFORMER_TABLE(LEAPFORMER_ISA);
const Kernels LEAPFORMER_TABLE(LEAPFORMER_ISA) = {LEAPFORMER_NAME(LEAPFORMER_ISA), forward, backward, step};
