// What the forward and the backward of the selective scan on CPUs share.
//
// Lanes are channels: a block of kLanes channels of one batch entry walks the time axis with its states in registers,
// so that B and C are broadcasts and nothing is summed across lanes in the forward. Blocks are independent.
#pragma once

#include <numeric>

#include "lanes.h"
#include "selective_scan.h"

namespace parrot {
namespace PARROT_ISA {

struct ScanShape {
    int64_t batch, dim, length, state;
    int64_t groups, group_dim;         // of channels that share rows of B and of C
    int64_t blocks_per_group, blocks;  // of lanes

    template <typename F>
    static ScanShape of(const SelectiveScanInputs& p) {
        ScanShape s;
        s.batch = p.u.size[0], s.dim = p.u.size[1], s.length = p.u.size[2], s.state = p.A.size[1];
        s.groups = std::lcm(scan_groups(p.B), scan_groups(p.C));
        s.group_dim = s.dim / s.groups;
        s.blocks_per_group = (s.group_dim + kLanes<F> - 1) / kLanes<F>;
        s.blocks = s.groups * s.blocks_per_group;
        return s;
    }
};

// The channels of block `index` (of ScanShape::blocks).
template <typename F>
struct Lanes {
    int64_t group, first;
    int count;

    Lanes(const ScanShape& s, int64_t index) {
        group = index / s.blocks_per_group;
        const int64_t start = index % s.blocks_per_group * kLanes<F>;
        first = group * s.group_dim + start;
        count = static_cast<int>(s.group_dim - start < kLanes<F> ? s.group_dim - start : kLanes<F>);
    }
};

// A (channel, state) plane with tiles [state][lane]: A, constant B and C, states.
inline Strip state_strip(int64_t channel_stride, int64_t state_stride, int channels, int64_t states) {
    return {channel_stride, state_stride, channels, 0, static_cast<int>(states), false};
}

// One sequence: where its scan steps lie in time, and where packed sequences start.
struct Sequence {
    int64_t length;
    bool reverse;
    const int32_t* ids;
    int64_t id_stride;

    Sequence(const SelectiveScanInputs& p, int64_t b) : reverse(p.reverse), ids(nullptr), id_stride(0) {
        length = p.lengths ? p.lengths.ptr<const int32_t>()[b * p.lengths.stride[0]] : p.u.size[2];
        if (p.seq_idx) {
            ids = p.seq_idx.ptr<const int32_t>() + b * p.seq_idx.stride[0];
            id_stride = p.seq_idx.stride[1];
        }
    }
    int64_t time(int64_t step) const { return reverse ? length - 1 - step : step; }
    bool starts(int64_t step) const {
        return ids && step > 0 && ids[time(step) * id_stride] != ids[time(step - 1) * id_stride];
    }
    Strip strip(const TensorView& view, int channels, int64_t step, int steps) const {
        return {view.stride[1], view.stride[2], channels, time(step), steps, reverse};
    }
};

// B or C, ready to be read one step after the other: rows of `state` contiguous elements by time, or, constant, tiles
// [state][lane] by block. Copied only if the tensor is not laid out so already.
template <typename T, typename F>
class Rows {
  public:
    Rows(const TensorView& view, const ScanShape& shape)
        : view_(view),
          shape_(shape),
          constant_(view.ndim == 2),
          in_place_(!constant_ && sizeof(T) == sizeof(F) && view.stride[view.ndim - 2] == 1),
          groups_per_row_(shape.groups / scan_groups(view)),
          copy_(in_place_   ? 0
                : constant_ ? shape.blocks * shape.state * kLanes<F>
                            : shape.batch * scan_groups(view) * shape.length * shape.state) {}

    bool constant() const { return constant_; }
    int64_t pieces() const {
        return in_place_ ? 0 : constant_ ? shape_.blocks : shape_.batch * scan_groups(view_) * slices();
    }

    // Piece i of the copy; pieces are independent.
    void prepare(int64_t i) const {
        if (constant_) {
            const Lanes<F> lanes(shape_, i);
            load_tile<F, F>(copy_.get() + i * shape_.state * kLanes<F>,
                            view_.ptr<const F>() + lanes.first * view_.stride[0],
                            state_strip(view_.stride[0], view_.stride[1], lanes.count, shape_.state));
            return;
        }
        const int64_t row = i / slices(), groups = scan_groups(view_), start = i % slices() * kSlice;
        const T* from = view_.ptr<const T>() + row / groups * view_.stride[0] +
                        (view_.ndim == 4 ? row % groups * view_.stride[1] : 0);
        F* to = copy_.get() + row * shape_.length * shape_.state;
        const int64_t state_stride = view_.stride[view_.ndim - 2], time_stride = view_.stride[view_.ndim - 1];
        const int64_t stop = start + kSlice < shape_.length ? start + kSlice : shape_.length;
        for (int64_t n = 0; n < shape_.state; ++n)
            for (int64_t t = start; t < stop; ++t)
                to[t * shape_.state + n] = to_real<F>(from[n * state_stride + t * time_stride]);
    }

    // Of time 0; of a block if constant.
    const F* rows(int64_t b, int64_t block, int64_t group) const {
        if (constant_) return copy_.get() + block * shape_.state * kLanes<F>;
        const int64_t row = group / groups_per_row_;
        if (!in_place_) return copy_.get() + (b * scan_groups(view_) + row) * shape_.length * shape_.state;
        return view_.ptr<const F>() + b * view_.stride[0] + (view_.ndim == 4 ? row * view_.stride[1] : 0);
    }
    int64_t stride() const { return constant_ ? 0 : in_place_ ? view_.stride[view_.ndim - 1] : shape_.state; }

  private:
    static constexpr int64_t kSlice = 128;  // steps copied by one piece
    int64_t slices() const { return (shape_.length + kSlice - 1) / kSlice; }

    const TensorView& view_;
    const ScanShape& shape_;
    bool constant_, in_place_;
    int64_t groups_per_row_;
    Buffer<F> copy_;
};

// Of B or C at a step, as a vector over the channels. `rows`: at the step, at the first of some states.
template <typename F, bool constant>
PARROT_INLINE Vec<F> entry(const F* rows, int n) {
    return constant ? load(rows + n * kLanes<F>) : broadcast(rows[n]);
}

template <typename F>
inline Vec<F> load_lanes(const TensorView& vector, const Lanes<F>& lanes) {
    F values[kLanes<F>] = {};
    if (vector)
        for (int c = 0; c < lanes.count; ++c) values[c] = vector.ptr<const F>()[(lanes.first + c) * vector.stride[0]];
    return load(values);
}

}  // namespace PARROT_ISA
}  // namespace parrot
