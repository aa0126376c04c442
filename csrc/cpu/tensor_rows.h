// Reading and writing rows of strided tensors of any floating dtype in the compute type.
#pragma once

#include <cstring>

#include "simd.h"
#include "tensor_view.h"

namespace parrot {
namespace PARROT_ISA {

inline float from_bf16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bf16(float value) {  // to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    // The product with 2^112 moves the exponent's bias from 15 to 127 and turns denormals into normal numbers.
    float value = bit_cast<float>(rest << 13) * 5.192296858534828e33f;
    if (rest >= 0x7c00) value = bit_cast<float>(0x7f800000 | (rest << 13));  // infinity, NaN
    return bit_cast<float>(sign | bit_cast<uint32_t>(value));
}

inline uint16_t to_f16(float value) {  // to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds beyond the largest half
    if (magnitude < 0x38800000) {                       // denormal: the addition rounds to a multiple of 2^-24
        const float shifted = bit_cast<float>(magnitude) + 0.5f;
        return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000);
    }
    return sign | static_cast<uint16_t>((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13);
}

// Row `index` of the last dimension: the address of its first element is given by the leading indices.
struct RowView {
    const TensorView* view;
    int64_t offset, stride;

    RowView(const TensorView& tensor, int64_t i)
        : view(&tensor), offset(i * tensor.stride[0]), stride(tensor.stride[1]) {}
    RowView(const TensorView& tensor, int64_t i, int64_t j)
        : view(&tensor), offset(i * tensor.stride[0] + j * tensor.stride[1]), stride(tensor.stride[2]) {}

    RowView from(int64_t element) const {
        RowView rest = *this;
        rest.offset += element * stride;
        return rest;
    }

    // Asks for `count` elements to be brought into the cache; harmless where there are none.
    PARROT_INLINE void prefetch(int64_t count) const {
        if (stride != 1) return;
        const int64_t size = view->dtype == DType::f64 ? 8 : view->dtype == DType::f32 ? 4 : 2;
        const char* p = view->ptr<const char>() + offset * size;
        for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(p + byte);
    }

    // The address of the row if it lies plainly in memory in type T, else null.
    template <typename T>
    T* plain() const {
        const DType wanted = sizeof(T) == 4 ? DType::f32 : DType::f64;
        return view->dtype == wanted && stride == 1 ? view->ptr<T>() + offset : nullptr;
    }
};

template <typename T>
inline void read_row(RowView row, int64_t count, T* out) {
    const int64_t stride = row.stride;
    switch (row.view->dtype) {
        case DType::f32: {
            const float* p = row.view->ptr<const float>() + row.offset;
            if (stride == 1)
                for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
            else
                for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i * stride]);
            return;
        }
        case DType::f64: {
            const double* p = row.view->ptr<const double>() + row.offset;
            for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i * stride]);
            return;
        }
        case DType::f16: {
            const uint16_t* p = row.view->ptr<const uint16_t>() + row.offset;
            for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(from_f16(p[i * stride]));
            return;
        }
        default: {
            const uint16_t* p = row.view->ptr<const uint16_t>() + row.offset;
            for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(from_bf16(p[i * stride]));
            return;
        }
    }
}

// Rows [begin, begin + kLanes) of a problem's (count, features) matrix, padded with zeros to (kLanes, stride); zeros
// where there is no tensor.
template <typename T>
inline void read_group(const TensorView& from, int64_t problem, int64_t begin, int64_t count, int64_t features, T* out,
                       int64_t stride) {
    const int64_t valid = !from || count < begin ? 0 : count - begin < kLanes<T> ? count - begin : kLanes<T>;
    const int64_t whole = features / kLanes<T> * kLanes<T>;
    for (int64_t i = begin; i < begin + valid; ++i, out += stride) {
        const RowView row(from, problem, i);
        if (i + 4 < count) RowView(from, problem, i + 4).prefetch(features);
        if (const T* plain = row.plain<T>()) {
            for (int64_t d = 0; d < whole; d += kLanes<T>) store(out + d, load(plain + d));
            for (int64_t d = whole; d < features; ++d) out[d] = plain[d];
        } else {
            read_row(row, features, out);
        }
        for (int64_t d = features; d < stride; ++d) out[d] = 0;
    }
    for (int64_t d = 0; d < (kLanes<T> - valid) * stride; d += kLanes<T>) store(out + d, Vec<T>{});
}

// Writes `count` values, then zeros up to `total`.
template <typename T>
inline void write_row(RowView row, const T* in, int64_t count, int64_t total) {
    const int64_t stride = row.stride;
    auto write = [&](auto* base, auto convert) {
        auto* p = base + row.offset;
        if (stride == 1)
            for (int64_t i = 0; i < count; ++i) p[i] = convert(in[i]);
        else
            for (int64_t i = 0; i < count; ++i) p[i * stride] = convert(in[i]);
        for (int64_t i = count; i < total; ++i) p[i * stride] = 0;
    };
    switch (row.view->dtype) {
        case DType::f32:
            return write(row.view->ptr<float>(), [](T v) { return static_cast<float>(v); });
        case DType::f64:
            return write(row.view->ptr<double>(), [](T v) { return static_cast<double>(v); });
        case DType::f16:
            return write(row.view->ptr<uint16_t>(), [](T v) { return to_f16(static_cast<float>(v)); });
        default:
            return write(row.view->ptr<uint16_t>(), [](T v) { return to_bf16(static_cast<float>(v)); });
    }
}

template <typename T>
inline T& element(const TensorView& view, int64_t i) {
    return view.ptr<T>()[i * view.stride[0]];
}

}  // namespace PARROT_ISA
}  // namespace parrot
