// Rows of a cost matrix that is never whole: computed from the points, or read from a tensor, when they are needed.
#pragma once

#include "pairwise_cost.h"
#include "tensor_rows.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct CostTiles {
    static constexpr int L = kLanes<T>;
    static constexpr int64_t kRows = 32;  // of a tile, over all columns

    PairwiseCost<T> pairwise;  // prepared, unless there is a matrix
    TensorView matrix;         // (B, rows, columns), or absent
    int64_t problem;
    int64_t columns, columns_pad;

    // Rows [begin, end) into the first rows of `tile`, begin a multiple of kLanes; not scaled, zero in padded
    // columns. Returns the largest entry.
    T rows(int64_t begin, int64_t end, Blocked<T> tile) const {
        if (!matrix) return pairwise.from_row(begin).rows(0, end - begin, tile);
        Vec<T> largest{};
        for (int64_t i = begin; i < end; ++i)
            for (int64_t j = 0; j < columns_pad; j += L) {
                T values[L] = {};
                read_row(RowView(matrix, problem, i).from(j), columns - j < L ? columns - j : L, values);
                store(tile.at(i - begin, j), load(values));
                largest = vmax(load(values), largest);
            }
        return max_lanes<T>(largest);
    }

    // Of the transposed matrix; `packed` is for (rows, features) and yet to be filled by `pack_columns`.
    CostTiles transposed(T* packed) const {
        CostTiles other = *this;
        other.pairwise = pairwise.transposed(packed);
        other.columns = pairwise.n, other.columns_pad = pairwise.n_pad;
        if (matrix) {
            other.matrix.size[1] = matrix.size[2], other.matrix.size[2] = matrix.size[1];
            other.matrix.stride[1] = matrix.stride[2], other.matrix.stride[2] = matrix.stride[1];
        }
        return other;
    }
};

// Log-sum-exp of potential_j - c_ij over row `i` of a tile.
template <typename T>
__attribute__((noinline)) T row_lse(Blocked<T> tile, int64_t i, const T* potential, T scale) {
    constexpr int L = kLanes<T>;
    const T* c = tile.at(i, 0);
    Vec<T> largest = broadcast(-T(__builtin_huge_val())), sum{};
    for (int64_t j = 0; j < tile.columns; j += L)
        largest = vmax(load(potential + j) - load(c + j * L) * scale, largest);
    const T offset = max_lanes<T>(largest);
    for (int64_t j = 0; j < tile.columns; j += L)
        sum += exp<T>((load(potential + j) - load(c + j * L) * scale) - offset);
    return offset + log_one(sum_lanes<T>(sum));
}

// Row `i` of `out`: exp(row + columns_j - c_ij). Returns the largest exponent.
template <typename T>
PARROT_INLINE T fill_row(Blocked<T> tile, int64_t i, T row, const T* columns, T scale, Blocked<T> out) {
    constexpr int L = kLanes<T>;
    const T* c = tile.at(i, 0);
    T* to = out.at(i, 0);
    Vec<T> largest = broadcast(-T(__builtin_huge_val()));
    for (int64_t j = 0; j < tile.columns; j += L) {
        const Vec<T> exponent = (load(columns + j) + row) - load(c + j * L) * scale;
        largest = vmax(exponent, largest);
        store(to + j * L, exp<T>(exponent));
    }
    return max_lanes<T>(largest);
}

// Sum of row `i` times `factors`.
template <typename T>
PARROT_INLINE T dot_row(Blocked<T> tile, int64_t i, const T* factors) {
    constexpr int L = kLanes<T>;
    const T* entry = tile.at(i, 0);
    Vec<T> sum{};
    for (int64_t j = 0; j < tile.columns; j += L) sum += load(entry + j * L) * load(factors + j);
    return sum_lanes<T>(sum);
}

template <typename T>
PARROT_INLINE T sum_row(Blocked<T> tile, int64_t i) {
    Vec<T> sum{};
    for (int64_t j = 0; j < tile.columns; j += kLanes<T>) sum += load(tile.at(i, j));
    return sum_lanes<T>(sum);
}

// sums_j += sum_i factor_i tile_ij over `count` rows.
template <typename T>
__attribute__((noinline)) void add_rows(Blocked<T> tile, int64_t count, const T* factors, T* sums) {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int64_t j = 0; j < tile.columns; j += L) {
            const Vec<T> even = load(tile.at(i, j)) * factors[i] + load(tile.at(i + 2, j)) * factors[i + 2];
            const Vec<T> odd = load(tile.at(i + 1, j)) * factors[i + 1] + load(tile.at(i + 3, j)) * factors[i + 3];
            store(sums + j, load(sums + j) + (even + odd));
        }
    for (; i < count; ++i)
        for (int64_t j = 0; j < tile.columns; j += L)
            store(sums + j, load(sums + j) + load(tile.at(i, j)) * factors[i]);
}

}  // namespace PARROT_ISA
}  // namespace parrot
