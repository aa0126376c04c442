// Threads that walk through one program together, and scratch memory that outlives a call.
#pragma once

#include <omp.h>
#include <sched.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "simd.h"

namespace parrot {
namespace PARROT_ISA {

// Arrays share blocks of memory: AddressSanitizer is told where one ends, and a little is left free after it.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 64;
inline void forbid(const void* data, size_t bytes) { __asan_poison_memory_region(data, bytes); }
inline void permit(const void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr size_t kGuard = 0;
inline void forbid(const void*, size_t) {}
inline void permit(const void*, size_t) {}
#endif

// Waits by spinning, as iterations are short, but not for long: where threads outnumber processors, the one that is
// waited for needs the processor.
class Barrier {
  public:
    void wait(int size) {
        const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
            __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
            if (spins > kSpins) sched_yield();
#if defined(__SSE2__)
            else
                _mm_pause();
#endif
        }
    }

  private:
    static constexpr int kSpins = 1000;
    alignas(64) int arrived_ = 0;
    alignas(64) int generation_ = 0;
};

// Every thread of a team runs the same code on private copies of the scalars; shared arrays are written inside
// `for_each` only. Blocks, never threads, decide how work is cut and in which order sums are taken, so that results
// are bitwise the same for any number of threads.
struct Team {
    int rank = 0;
    int size = 1;  // 0: this thread sits out
    Barrier* meeting = nullptr;

    struct Range {
        int64_t begin, end;
    };

    // What is this thread's of [0, count).
    Range share(int64_t count) const {
        return size == 0 ? Range{0, 0} : Range{count * rank / size, count * (rank + 1) / size};
    }

    // body(i) for 0 <= i < count. Each thread gets the same range every time, so its blocks stay in its cache;
    // walking it backwards every other time starts with what is still there.
    template <typename Body>
    PARROT_INLINE void for_each(int64_t count, Body&& body, bool backwards = false) const {
        if (size == 0) return;
        const auto [begin, end] = share(count);
        if (backwards)
            for (int64_t i = end - 1; i >= begin; --i) body(i);
        else
            for (int64_t i = begin; i < end; ++i) body(i);
        barrier();
    }

    // body(true, i) for i < rows and body(false, j) for j < columns, with one barrier.
    template <typename Body>
    PARROT_INLINE void for_each(int64_t rows, int64_t columns, Body&& body) const {
        for_each(rows + columns, [&](int64_t i) { i < rows ? body(true, i) : body(false, i - rows); });
    }

    void barrier() const {
        if (meeting) meeting->wait(size);
    }

    // The team of thread 0 only, for work too small to share.
    Team alone() const { return {0, rank == 0 ? 1 : 0, nullptr}; }
};

// Whether threads share each problem of a batch, or take whole problems: whichever ends first. Only large enough
// problems iterate together; in others about half of the work is left to one thread.
inline bool threads_share(int threads, int64_t batch, bool iterate_together) {
    const double rounds = static_cast<double>((batch + threads - 1) / threads);
    return threads > 1 && static_cast<double>(batch) * (iterate_together ? 1.25 / threads : 0.5) < rounds;
}

// Runs body(team) on `threads` threads.
template <typename Body>
inline void run_team(int threads, Body&& body) {
    if (threads <= 1) {
        body(Team{});
        return;
    }
    Barrier meeting;
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
}

// Asks for huge pages in a block that is about to be written: where pages are fresh, those of 4 KiB can cost more than
// what is computed into them.
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = uintptr_t{2} << 20;
    const uintptr_t start = reinterpret_cast<uintptr_t>(data), first = (start + page - 1) / page * page;
    const uintptr_t end = (start + bytes) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Scratch memory of the calling thread, kept between calls up to kKeep bytes: fresh pages cost more than the work
// done in them. Contents are unspecified.
class Arena {
  public:
    static constexpr size_t kKeep = size_t{256} << 20;

    ~Arena() { std::free(memory_); }

    // Null where there is no memory: exceptions can't leave a parallel region.
    char* reserve(size_t bytes) {
        if (bytes > capacity_) {
            std::free(memory_);
            memory_ = nullptr, capacity_ = 0;
            constexpr size_t huge_page = size_t{2} << 20;
            const size_t align = bytes >= 2 * huge_page ? huge_page : 4096;
            const size_t rounded = (bytes + align - 1) / align * align;
            memory_ = static_cast<char*>(std::aligned_alloc(align, rounded));
            if (!memory_) return nullptr;
            if (align == huge_page) prefer_huge_pages(memory_, rounded);
            capacity_ = rounded;
        }
        permit(memory_, capacity_);
        return memory_;
    }

    size_t capacity() const { return capacity_; }

    void trim() {
        if (capacity_ <= kKeep) return;
        std::free(memory_);
        memory_ = nullptr, capacity_ = 0;
    }

  private:
    char* memory_ = nullptr;
    size_t capacity_ = 0;
};

inline Arena& thread_arena() {
    static thread_local Arena arena;
    return arena;
}

// Cuts an arena into arrays. Run once without memory to learn the size, then again with it.
class Carver {
  public:
    explicit Carver(char* memory = nullptr) : memory_(memory) {}

    template <typename T>
    T* take(int64_t count) {
        const size_t offset = used_, bytes = static_cast<size_t>(count) * sizeof(T);
        used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment + kGuard;
        if (memory_) forbid(memory_ + offset + bytes, used_ - offset - bytes);
        return memory_ ? reinterpret_cast<T*>(memory_ + offset) : nullptr;
    }

    size_t used() const { return used_; }

  private:
    char* memory_;
    size_t used_ = 0;
};

}  // namespace PARROT_ISA
}  // namespace parrot
