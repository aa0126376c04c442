// Runs CUDA kernels on the host, one fiber per thread of a block: enough of CUDA to execute the kernels of
// csrc/cuda as they are. Barriers and shuffles switch fibers, so races within a barrier interval stay unseen.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
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

using std::fma;
using std::isinf;
using std::max;
using std::min;

namespace emulation {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current = 0, alive = 0;
inline dim3 thread_index, block_index;
inline double values[1024];  // what the threads show each other

inline void enter() {
    body();
    fibers[current].done = true;
    --alive;
    swapcontext(&fibers[current].context, &scheduler);
}

// Every living fiber runs to its next barrier before any goes on: a barrier of the whole block, which is stronger
// than one of a warp and as good for kernels whose warps meet the same barriers.
inline void barrier() { swapcontext(&fibers[current].context, &scheduler); }

template <typename T>
T shuffle_xor(T value, int mask) {
    const unsigned self = current;
    values[self] = static_cast<double>(value);
    barrier();
    const T other = static_cast<T>(values[self ^ mask]);
    barrier();
    return other;
}

inline unsigned ballot(bool vote) {
    const unsigned self = current;
    values[self] = vote;
    barrier();
    unsigned result = 0;
    for (unsigned i = 0; i < 32; ++i) result |= (values[self / 32 * 32 + i] != 0 ? 1u : 0u) << i;
    barrier();
    return result;
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, dim3 grid, unsigned threads, const Arguments&... arguments) {
    body = [&] { kernel(arguments...); };
    fibers.resize(threads);
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
        for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
            for (Fiber& fiber : fibers) {
                fiber.stack.resize(1 << 16);
                fiber.done = false;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
            }
            alive = threads;
            while (alive > 0)
                for (current = 0; current < threads; ++current)
                    if (!fibers[current].done) {
                        thread_index = dim3(current);
                        swapcontext(&scheduler, &fibers[current].context);
                    }
        }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define __syncthreads() emulation::barrier()
#define __syncwarp() emulation::barrier()
#define __shfl_xor_sync(mask, value, by) emulation::shuffle_xor(value, by)
#define __ballot_sync(mask, vote) emulation::ballot(vote)
#define PARROT_LAUNCH(kernel, grid, threads, stream, ...) emulation::launch(kernel, grid, threads, __VA_ARGS__)

// The runtime, without a device: PARROT_EMULATED_MULTIPROCESSORS sets how wide it pretends to be.
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(status) ""
#define cudaDeviceGetAttribute(value, attribute, device) \
    (*(value) = std::atoi(std::getenv("PARROT_EMULATED_MULTIPROCESSORS")), cudaSuccess)
