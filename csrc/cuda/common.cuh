// What every CUDA kernel shares: element conversion, fast functions with known accuracy, the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "tensor_view.h"

#ifndef PARROT_LAUNCH
#define PARROT_LAUNCH(kernel, grid, threads, stream, ...) \
    PARROT_LAUNCH_SHARED(kernel, grid, threads, 0, stream, __VA_ARGS__)
#define PARROT_LAUNCH_SHARED(kernel, grid, threads, bytes, stream, ...) \
    kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define PARROT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

namespace parrot {
namespace cuda {

// States and sums are kept in fp32, in fp64 for fp64 inputs.
template <typename T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_compute(Compute<T> x) {
    return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half from_compute<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// The same value, which the compiler takes for a new one: multiples of it are recomputed in a loop (an addition), not
// kept in registers across it.
__device__ __forceinline__ int64_t opaque(int64_t x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(x));
#endif
    return x;
}

__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

constexpr double kLog2e = 1.4426950408889634;

// 2^x. In fp32 by the special-function unit: 2 ulp, results below the normal range become zero.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

// log(1 + exp(x)), the identity above torch's threshold. log1p keeps the relative accuracy of small steps.
__device__ __forceinline__ float softplus(float x) {
    return x > 20.0f ? x : log1pf(exp2_fast(x * static_cast<float>(kLog2e)));
}
__device__ __forceinline__ double softplus(double x) { return x > 20.0 ? x : log1p(exp(x)); }

__device__ __forceinline__ float sigmoid(float x) {
    const float y = 1.0f + exp2_fast(-x * static_cast<float>(kLog2e));
#ifdef __CUDA_ARCH__
    float r;  // 1 ulp
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
    return r;
#else
    return 1.0f / y;
#endif
}
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

template <typename Real>
__device__ __forceinline__ Real silu(Real x) {
    return x * sigmoid(x);
}
template <typename Real>
__device__ __forceinline__ Real silu_derivative(Real x) {
    const Real s = sigmoid(x);
    return s * (Real(1) + x * (Real(1) - s));
}

// A small operand whose elements are of the input type T or, `wide`, of the compute type.
template <typename T>
struct Operand {
    const void* data = nullptr;
    bool wide = false;

    Operand() = default;
    explicit Operand(const TensorView& view)
        : data(view.data), wide(view.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32)) {}
    __device__ __forceinline__ Compute<T> operator[](int64_t i) const {
        if constexpr (std::is_same<T, Compute<T>>::value) return static_cast<const T*>(data)[i];
        return wide ? static_cast<const Compute<T>*>(data)[i] : to_compute(static_cast<const T*>(data)[i]);
    }
};

// An index tensor of 32 or 64 bits.
struct Integers {
    const void* data = nullptr;
    bool wide = false;

    Integers() = default;
    explicit Integers(const TensorView& view) : data(view.data), wide(view.dtype == DType::i64) {}
    __device__ __forceinline__ int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

inline const char* last_launch_error() {
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Bytes of shared memory that a block of the current device can have at most.
inline int most_shared_memory() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    return bytes;
}

// Lets a kernel be launched with this much dynamic shared memory. Returns nullptr, or what went wrong.
template <typename Kernel>
const char* allow_shared_memory(Kernel* kernel, size_t bytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

inline int multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 1;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return count;
}

}  // namespace cuda
}  // namespace parrot
