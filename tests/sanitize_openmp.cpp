// Preloaded by sanitize.py. ThreadSanitizer can't see into libgomp, so that every region of threads would look like a
// race with what came before and after it: here it is told in which order they are. Itself it is not instrumented.
#include <dlfcn.h>

extern "C" {
void __tsan_acquire(void* token) __attribute__((weak));
void __tsan_release(void* token) __attribute__((weak));
}

namespace {

struct Region {
    void (*body)(void*);
    void* data;
    char start, meeting, end;  // tokens: only their addresses count
};

thread_local Region* current = nullptr;

template <typename Function>
Function original(Function, const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

void run(void* argument) {
    Region& region = *static_cast<Region*>(argument);
    Region* const outer = current;
    current = &region;
    __tsan_acquire(&region.start);
    region.body(region.data);
    __tsan_release(&region.end);
    current = outer;
}

}  // namespace

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
    static const auto libgomp = original(&GOMP_parallel, "GOMP_parallel");
    Region region{body, data, 0, 0, 0};
    __tsan_release(&region.start);
    libgomp(run, &region, threads, flags);
    __tsan_acquire(&region.end);
}

// All that the threads of a region did before they meet is done when they go on.
template <typename Function>
void meet(Function wait) {
    Region* const region = current;
    if (region) __tsan_release(&region->meeting);
    wait();
    if (region) __tsan_acquire(&region->meeting);
}

extern "C" void GOMP_barrier() {
    static const auto libgomp = original(&GOMP_barrier, "GOMP_barrier");
    meet(libgomp);
}

extern "C" void GOMP_loop_end() {  // that of a loop whose iterations are handed out one by one
    static const auto libgomp = original(&GOMP_loop_end, "GOMP_loop_end");
    meet(libgomp);
}
