// Threads: those of the OpenMP runtime that is already in the process, handed in by Python, else plain ones.
#include <atomic>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#include "interface.h"

namespace {

typedef void (*GompParallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
typedef void (*KmpcFork)(void* location, int32_t arguments, void (*function)(int32_t*, int32_t*, void*), ...);
typedef void (*KmpcPush)(void* location, int32_t thread, int32_t threads);
typedef int32_t (*KmpcThread)(void* location);

GompParallel gomp_parallel = nullptr;
KmpcFork kmpc_fork = nullptr;
KmpcPush kmpc_push = nullptr;
KmpcThread kmpc_thread = nullptr;

std::atomic<int64_t> most{0};  // bytes of one allocation, in tests; 0: as many as there are

// A thread's memory, kept between calls so that its pages are mapped once.
struct Memory {
    float* data = nullptr;
    int64_t floats = 0;
    // Null where there is none.
    float* get(int64_t wanted) {
        if (wanted > floats || !data) {
            free(data);
            data = (float*)allocate(wanted * sizeof(float));
            floats = data ? wanted : 0;
        }
        return data;
    }
    ~Memory() { free(data); }
};
thread_local Memory memory;

struct Job {
    Work work;
    const void* context;
    int64_t items, floats;
    std::atomic<int64_t> next{0};

    void run() {
        float* own = memory.get(floats);
        if (!own) return;
        for (int64_t item; (item = next.fetch_add(1)) < items;) work(context, item, own);
    }
};

void run_job(void* job) { ((Job*)job)->run(); }
void run_kmpc_job(int32_t*, int32_t*, void* job) { ((Job*)job)->run(); }

}  // namespace

void* allocate(int64_t bytes) {
    if (most && bytes > most) return nullptr;
    return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
}

bool run_parallel(int64_t threads, int64_t items, Work work, const void* context, int64_t floats) {
    Job job{work, context, items, floats};
    if (threads > items) threads = items;
    if (threads <= 1)
        job.run();
    else if (gomp_parallel)
        gomp_parallel(run_job, &job, unsigned(threads), 0);
    else if (kmpc_fork && kmpc_push && kmpc_thread) {
        // An ident_t of zeros with a source string, as the runtime wants it.
        static struct { int32_t reserved, flags, reserved2, reserved3; const char* source; } location = {0, 2, 0, 0, ";unknown;unknown;0;0;;"};
        kmpc_push(&location, kmpc_thread(&location), int32_t(threads));
        kmpc_fork(&location, 1, (void (*)(int32_t*, int32_t*, void*))run_kmpc_job, &job);
    } else {
        std::vector<std::thread> others;
        try {
            others.reserve(threads);
            for (int64_t i = 1; i < threads; i++) others.emplace_back(run_job, &job);
        } catch (const std::exception&) {
            // Fewer threads than wanted, then.
        }
        job.run();
        for (auto& thread : others) thread.join();
    }
    return job.next >= items;
}

#define DOOR extern "C" __attribute__((visibility("default")))

// Addresses of GOMP_parallel, or of __kmpc_fork_call, __kmpc_push_num_threads and __kmpc_global_thread_num; 0: not there.
DOOR void leapformer_use_threads(void* parallel, void* fork_call, void* push, void* thread) {
    gomp_parallel = (GompParallel)parallel;
    kmpc_fork = (KmpcFork)fork_call, kmpc_push = (KmpcPush)push, kmpc_thread = (KmpcThread)thread;
}
// For tests: allocations of more bytes fail from now on; 0: none does.
DOOR void leapformer_limit_memory(int64_t bytes) { most = bytes; }
