// Runs CUDA kernels on the host, one fiber per thread of a block: enough of CUDA to execute the kernels of
// csrc/cuda as they are. Barriers and shuffles switch fibers, so races within a barrier interval stay unseen; what
// shared memory holds at the start is NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

using std::exp2;
using std::fabs;
using std::fma;
using std::isinf;
using std::log2;
using std::max;
using std::min;
using std::sqrt;

namespace emulation {

enum class Waiting { no, warp, block };

struct Fiber {
    ucontext_t context;  // where it begins; from there on it is switched by jumps, which need no system call
    jmp_buf place;
    std::vector<char> stack;
    bool started = false, done = false;
    Waiting waiting = Waiting::no;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline unsigned current = 0, alive = 0;
inline dim3 thread_index, block_index, block_size;
inline double values[1024];  // what the threads show each other
alignas(16) inline char dynamic_shared[1 << 18];

inline void enter() {
    body();
    fibers[current].done = true;
    --alive;
    _longjmp(scheduler, 1);
}

inline void wait(Waiting what) {
    fibers[current].waiting = what;
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends.
inline void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

inline void barrier() { wait(Waiting::block); }
inline void warp_barrier() { wait(Waiting::warp); }

inline bool barrier_or(bool vote) {
    const unsigned self = current;
    values[self] = vote;
    barrier();
    bool result = false;
    for (unsigned i = 0; i < block_size.x; ++i) result |= values[i] != 0;
    barrier();
    return result;
}

template <typename T>
T shuffle_xor(T value, int mask) {
    const unsigned self = current;
    values[self] = static_cast<double>(value);
    warp_barrier();
    const T other = static_cast<T>(values[self ^ mask]);
    warp_barrier();
    return other;
}

template <typename T>
T shuffle(T value, int lane) {
    const unsigned self = current;
    values[self] = static_cast<double>(value);
    warp_barrier();
    const T other = static_cast<T>(values[self / 32 * 32 + lane]);
    warp_barrier();
    return other;
}

inline unsigned ballot(bool vote) {
    const unsigned self = current;
    values[self] = vote;
    warp_barrier();
    unsigned result = 0;
    for (unsigned i = 0; i < 32; ++i) result |= (values[self / 32 * 32 + i] != 0 ? 1u : 0u) << i;
    warp_barrier();
    return result;
}

// Runs the living fibers of one warp until all of them have ended or wait for the block.
inline void run_warp(unsigned first, unsigned last) {
    for (bool going = true; going;) {
        unsigned in_warp = 0, in_block = 0;
        for (current = first; current < last; ++current) {
            Fiber& fiber = fibers[current];
            if (!fiber.done && fiber.waiting == Waiting::no) {
                thread_index = dim3(current);
                resume(fiber);
            }
            if (!fiber.done) ++(fiber.waiting == Waiting::warp ? in_warp : in_block);
        }
        if (in_warp > 0 && in_block > 0) {
            std::fprintf(stderr, "emulation: lanes of a warp wait at different barriers\n");
            std::abort();
        }
        going = in_warp > 0;
        for (unsigned i = first; going && i < last; ++i) fibers[i].waiting = Waiting::no;
    }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, dim3 grid, unsigned threads, size_t bytes, const Arguments&... arguments) {
    if (bytes > sizeof(dynamic_shared)) std::abort();
    body = [&] { kernel(arguments...); };
    fibers.resize(threads);
    block_size = dim3(threads);
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
        for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
            std::memset(dynamic_shared, 0xff, sizeof(dynamic_shared));  // NaN
            for (Fiber& fiber : fibers) {
                fiber.stack.resize(1 << 16);
                fiber.started = fiber.done = false, fiber.waiting = Waiting::no;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
            }
            alive = threads;
            while (alive > 0) {
                for (unsigned first = 0; first < threads; first += 32) run_warp(first, std::min(first + 32, threads));
                for (Fiber& fiber : fibers) fiber.waiting = Waiting::no;
            }
        }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define __syncthreads() emulation::barrier()
#define __syncthreads_or(vote) emulation::barrier_or(vote)
#define __syncwarp() emulation::warp_barrier()
#define __shfl_sync(mask, value, lane) emulation::shuffle(value, lane)
#define __shfl_xor_sync(mask, value, by) emulation::shuffle_xor(value, by)
#define __ballot_sync(mask, vote) emulation::ballot(vote)
#define PARROT_LAUNCH(kernel, grid, threads, stream, ...) emulation::launch(kernel, grid, threads, 0, __VA_ARGS__)
#define PARROT_LAUNCH_SHARED(kernel, grid, threads, bytes, stream, ...) \
    emulation::launch(kernel, grid, threads, bytes, __VA_ARGS__)
#define PARROT_DYNAMIC_SHARED(name) char* name = emulation::dynamic_shared

// The runtime, without a device: PARROT_EMULATED_MULTIPROCESSORS sets how wide it pretends to be.
namespace emulation {
inline cudaError_t device_attribute(int* value, cudaDeviceAttr which) {
    const char* width = std::getenv("PARROT_EMULATED_MULTIPROCESSORS");
    *value = which == cudaDevAttrMultiProcessorCount ? std::atoi(width ? width : "0") : 227 * 1024;
    return cudaSuccess;
}
}  // namespace emulation
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(status) ""
#define cudaDeviceGetAttribute(value, which, device) emulation::device_attribute(value, which)
#define cudaFuncSetAttribute(kernel, attribute, value) ((void)(kernel), cudaSuccess)
