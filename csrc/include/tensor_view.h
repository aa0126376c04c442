// A strided tensor as plain data: what crosses from Python into the kernels. No Python, no torch.
#pragma once

#include <cstdint>

namespace parrot {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, i32 = 4, i64 = 5, b8 = 6 };

constexpr int kMaxDims = 5;

// Strides count elements. `ndim == 0` stands for an argument that was not given.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    int ndim = 0;
    int64_t size[kMaxDims] = {};
    int64_t stride[kMaxDims] = {};

    explicit operator bool() const { return ndim > 0; }  // an empty tensor has no address but was given
    template <typename T>
    T* ptr() const {
        return static_cast<T*>(data);
    }
};

}  // namespace parrot
