// What the convolution's two layouts share. Row e of a sequence's line is step e - (W-1) in scan order, after the W-1
// inputs of the history; the output at step s reads the rows s to s + W-1, tap k the row s + k.
#pragma once

#include "dispatch.h"
#include "lanes.h"

namespace parrot {
namespace PARROT_ISA {

// Visits the taps k = 0..W-1; WIDTH > 0 is a width known to the compiler.
template <int WIDTH, typename Body>
PARROT_INLINE void for_taps(int width, Body&& body) {
    if constexpr (WIDTH > 0) {
        PARROT_UNROLL
        for (int k = 0; k < WIDTH; ++k) body(k);
    } else {
        for (int k = 0; k < width; ++k) body(k);
    }
}

template <typename F>
PARROT_INLINE Vec<F> silu(Vec<F> x) {
    return x * sigmoid<F>(x);
}
template <typename F>
PARROT_INLINE Vec<F> silu_derivative(Vec<F> x) {
    const Vec<F> sigma = sigmoid<F>(x);
    return sigma * (F(1) + x * (F(1) - sigma));
}

// The sequence of one batch entry.
struct ConvLine {
    int64_t length;
    int width;
    bool reverse;
    const int32_t* ids;  // null if the batch is not packed
    int64_t id_stride;

    ConvLine(const CausalConv1dInputs& p, int64_t b)
        : length(p.lengths ? p.lengths.ptr<const int32_t>()[b * p.lengths.stride[0]] : p.x.size[2]),
          width(static_cast<int>(p.weight.size[1])),
          reverse(p.reverse),
          ids(p.seq_idx ? p.seq_idx.ptr<const int32_t>() + b * p.seq_idx.stride[0] : nullptr),
          id_stride(p.seq_idx ? p.seq_idx.stride[1] : 0) {}

    int64_t rows() const { return length + width - 1; }
    int64_t time(int64_t step) const { return reverse ? length - 1 - step : step; }
    // The packed sequence that row e belongs to; the history to that of the first step.
    int32_t id(int64_t e) const {
        const int64_t step = e - (width - 1);
        return length > 0 ? ids[time(step > 0 ? step : 0) * id_stride] : 0;
    }
    // Whether the final state drops row e.
    bool dropped(int64_t e) const { return ids && length > 0 && id(e) != id(rows() - 1); }
};

// run(width, packed) with both known to the compiler; width 0: any.
template <typename Run>
inline void for_width(const CausalConv1dInputs& p, Run&& run) {
    auto with = [&](auto width) { p.seq_idx ? run(width, std::true_type{}) : run(width, std::false_type{}); };
    switch (p.weight.size[1]) {
        case 2:
            return with(std::integral_constant<int, 2>{});
        case 3:
            return with(std::integral_constant<int, 3>{});
        case 4:
            return with(std::integral_constant<int, 4>{});
        default:
            return with(std::integral_constant<int, 0>{});
    }
}

}  // namespace PARROT_ISA
}  // namespace parrot
