// The doors of the library, and the choice of an instruction set at load time.
#include <cstring>

#include "interface.h"

extern const Kernels kernels_baseline;
#if defined(LEAPFORMER_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

namespace {

const Kernels* choose(const char* wanted) {
#if defined(LEAPFORMER_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
    if (avx512 && (!wanted || !strcmp(wanted, "avx512"))) return &kernels_avx512;
    if (avx2 && (!wanted || !strcmp(wanted, "avx2"))) return &kernels_avx2;
#endif
    if (wanted && strcmp(wanted, "baseline")) return nullptr;
    return &kernels_baseline;
}

const Kernels* chosen = choose(nullptr);

}  // namespace

#define DOOR extern "C" __attribute__((visibility("default")))

// 1 where all is computed, 0 where memory was missing.
DOOR int leapformer_forward(const Problem* p) { return chosen->forward(p); }
DOOR int leapformer_backward(const Problem* p) { return chosen->backward(p); }
DOOR int leapformer_step(const Problem* p) { return chosen->step(p); }
DOOR const char* leapformer_instruction_set() { return chosen->name; }
// Takes "avx512", "avx2" or "baseline"; 0 where this machine cannot run it.
DOOR int leapformer_use_instruction_set(const char* name) {
    const Kernels* kernels = choose(name);
    if (kernels) chosen = kernels;
    return kernels != nullptr;
}
// Python packs Problem by position: both sides must agree on its size and on the order of its fields.
DOOR int64_t leapformer_problem_size() { return sizeof(Problem); }
DOOR int64_t leapformer_interface_version() { return 4; }
