#include "dispatch.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace parrot {
namespace cpu {
namespace {

int supported_level() {
#if defined(PARROT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 3;
#endif
    return 2;
}

int level() {
    static const int chosen = [] {
        int best = supported_level();
        const char* wanted = std::getenv("PARROT_CPU_ISA");
        if (wanted && wanted[0] == 'v' && wanted[1] >= '2' && wanted[1] <= '4' && wanted[2] == '\0')
            best = std::min(best, wanted[1] - '0');
        return best;
    }();
    return chosen;
}

// A forked child inherits an OpenMP runtime whose threads are gone: stay on the calling thread there.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const char* isa() {
    static const char* const names[] = {"v2", "v3", "v4"};
    return names[level() - 2];
}

#if defined(PARROT_X86)
#define PARROT_SELECT(function, params)  \
    switch (level()) {                   \
        case 4:                          \
            return v4::function(params); \
        case 3:                          \
            return v3::function(params); \
        default:                         \
            return v2::function(params); \
    }
#else
#define PARROT_SELECT(function, params) return v2::function(params);
#endif

#define PARROT_DEFINE(function, Params)     \
    void function(const Params& given) {    \
        Params params = given;              \
        if (forked) params.num_threads = 1; \
        PARROT_SELECT(function, params)     \
    }
PARROT_CPU_KERNELS(PARROT_DEFINE)

}  // namespace cpu
}  // namespace parrot
