// Small matrix products on packed panels, blocked for registers.
#pragma once

#include "simd.h"

namespace parrot {
namespace PARROT_ISA {

// A register tile is kTileRows x kTileVectors vectors. B is packed into panels of kTileVectors vectors of columns (the
// last one may be narrower), each stored row after row.
template <typename T>
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;
template <typename T>
constexpr int kTileVectors = kVectorBytes == 16 ? 2 : 3;
template <typename T>
constexpr int kGroup = kLanes<T> > kTileRows<T> ? kLanes<T> : kTileRows<T>;  // rows come in multiples of this
constexpr int64_t kDepth = 256;  // terms summed in one go: bounds rounding, and a panel's slice stays in the L1 cache

template <typename T>
constexpr int64_t round_to_group(int64_t n) {
    return (n + kGroup<T> - 1) / kGroup<T> * kGroup<T>;
}

// Panel p of B starts at this offset; `depth` is B's number of rows.
template <typename T>
PARROT_INLINE int64_t panel_offset(int64_t panel, int64_t depth) {
    return panel * depth * kTileVectors<T> * kLanes<T>;
}

// Address of element (row, column) of packed B, with `vectors` vectors of columns.
template <typename T>
PARROT_INLINE int64_t packed_index(int64_t row, int64_t vector, int64_t depth, int64_t vectors) {
    const int64_t panel = vector / kTileVectors<T>, left = vectors - panel * kTileVectors<T>;
    const int64_t width = left < kTileVectors<T> ? left : kTileVectors<T>;
    return panel_offset<T>(panel, depth) + (row * width + vector % kTileVectors<T>)*kLanes<T>;
}

// Packs row `row` (`vectors` full vectors, aligned and padded), times `factor`.
template <typename T>
PARROT_INLINE void pack_row(T* packed, const T* in, T factor, int64_t row, int64_t depth, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v)
        store(packed + packed_index<T>(row, v, depth, vectors), load(in + v * kLanes<T>) * factor);
}

template <typename T, int width>
PARROT_INLINE void matmul_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c, int64_t c_row,
                               bool accumulate) {
    constexpr int rows = kTileRows<T>, lanes = kLanes<T>;
    Vec<T> sum[rows][width];
    PARROT_UNROLL
    for (int r = 0; r < rows; ++r) PARROT_UNROLL
    for (int v = 0; v < width; ++v) sum[r][v] = accumulate ? load(c + r * c_row + v * lanes) : Vec<T>{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> bk[width];
        PARROT_UNROLL
        for (int v = 0; v < width; ++v) bk[v] = load(b + (k * width + v) * lanes);
        PARROT_UNROLL
        for (int r = 0; r < rows; ++r) {
            const Vec<T> ark = broadcast(a[r * a_row + k * a_col]);
            PARROT_UNROLL
            for (int v = 0; v < width; ++v) sum[r][v] += ark * bk[v];
        }
    }
    PARROT_UNROLL
    for (int r = 0; r < rows; ++r) PARROT_UNROLL
    for (int v = 0; v < width; ++v) store(c + r * c_row + v * lanes, sum[r][v]);
}

template <typename T, int width>
inline void matmul_panel(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c,
                         int64_t c_row) {
    for (int64_t k = 0; k < depth; k += kDepth)
        for (int64_t i = 0; i < rows; i += kTileRows<T>)
            matmul_tile<T, width>(depth - k < kDepth ? depth - k : kDepth, a + i * a_row + k * a_col, a_row, a_col,
                                  b + k * width * kLanes<T>, c + i * c_row, c_row, k > 0);
}

// C = A B for `rows` rows, a multiple of kTileRows; A has any strides.
template <typename T>
__attribute__((noinline)) void matmul(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b,
                                      int64_t vectors, T* c, int64_t c_row) {
    for (int64_t v = 0; v < vectors; v += kTileVectors<T>) {
        const T* panel = b + panel_offset<T>(v / kTileVectors<T>, depth);
        T* out = c + v * kLanes<T>;
        switch (vectors - v) {
            case 1:
                matmul_panel<T, 1>(rows, depth, a, a_row, a_col, panel, out, c_row);
                break;
            case 2:
                matmul_panel<T, 2>(rows, depth, a, a_row, a_col, panel, out, c_row);
                break;
            default:
                matmul_panel<T, kTileVectors<T>>(rows, depth, a, a_row, a_col, panel, out, c_row);
                break;
        }
    }
}

}  // namespace PARROT_ISA
}  // namespace parrot
