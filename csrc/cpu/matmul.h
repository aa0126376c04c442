// Small matrix products on packed panels, blocked for registers.
#pragma once

#include "simd.h"

namespace parrot {
namespace PARROT_ISA {

// A matrix blocked for registers: groups of kLanes rows; in a group, vector after vector of columns; in a vector, one
// row after another. Walks along rows or columns are sequential, and all rows of a group share one address.
template <typename T>
struct Blocked {
    T* first;
    int64_t columns;  // a multiple of kLanes

    static constexpr int64_t L = kLanes<T>;

    // The kLanes columns from `column` on of `row`.
    PARROT_INLINE T* at(int64_t row, int64_t column) const {
        return first + row / L * L * columns + column * L + row % L * L;
    }
};

// A register tile is kTileRows rows x kTileVectors vectors. B is packed into panels of kTileVectors vectors of columns
// (the last one may be narrower), each stored row after row.
template <typename T>
constexpr int kTileRows = kVectorBytes == 64 ? 8
                          : kLanes<T> < 4    ? kLanes<T>
                                             : 4;
template <typename T>
constexpr int kTileVectors = kVectorBytes == 16 ? 2 : 3;
constexpr int64_t kDepth = 256;  // terms summed in one go: bounds rounding, and a panel's slice stays in the L1 cache

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
    constexpr int64_t full = kTileVectors<T>;
    int64_t v = 0;
    for (T* out = packed + row * full * kLanes<T>; v + full <= vectors; v += full, out += panel_offset<T>(1, depth)) {
        PARROT_UNROLL
        for (int k = 0; k < full; ++k) store(out + k * kLanes<T>, load(in + (v + k) * kLanes<T>) * factor);
    }
    for (; v < vectors; ++v) store(packed + packed_index<T>(row, v, depth, vectors), load(in + v * kLanes<T>) * factor);
}

// Rows and columns in steps of kLanes, so that plain and blocked matrices can be walked alike: A(row, k) lies at
// first + row / kLanes * by_group + row % kLanes * by_row + k / kLanes * by_lanes + k % kLanes * by_term.
template <typename T>
struct LeftFactor {
    const T* first;
    int64_t by_row, by_group, by_term, by_lanes;
};

// Vector `vector` of C's row lies at first + row / kLanes * by_group + row % kLanes * by_row + vector * by_vector.
template <typename T>
struct Product {
    T* first;
    int64_t by_row, by_group, by_vector;
};

template <typename T, int width>
PARROT_INLINE void matmul_tile(int64_t depth, LeftFactor<T> a, const T* b, Product<T> c, bool accumulate) {
    constexpr int rows = kTileRows<T>, lanes = kLanes<T>;
    Vec<T> sum[rows][width];
    PARROT_UNROLL
    for (int r = 0; r < rows; ++r) PARROT_UNROLL
    for (int v = 0; v < width; ++v) sum[r][v] = accumulate ? load(c.first + r * c.by_row + v * c.by_vector) : Vec<T>{};
    for (int64_t block = 0; block < depth; block += lanes, a.first += a.by_lanes) {
        const int64_t terms = depth - block < lanes ? depth - block : lanes;
        const T* ak = a.first;
        for (int64_t k = 0; k < terms; ++k, ak += a.by_term, b += width * lanes) {
            Vec<T> bk[width];
            PARROT_UNROLL
            for (int v = 0; v < width; ++v) bk[v] = load(b + v * lanes);
            PARROT_UNROLL
            for (int r = 0; r < rows; ++r) {
                const Vec<T> ark = broadcast(ak[r * a.by_row]);
                PARROT_UNROLL
                for (int v = 0; v < width; ++v) sum[r][v] += ark * bk[v];
            }
        }
    }
    PARROT_UNROLL
    for (int r = 0; r < rows; ++r) PARROT_UNROLL
    for (int v = 0; v < width; ++v) store(c.first + r * c.by_row + v * c.by_vector, sum[r][v]);
}

template <typename T, int width>
inline void matmul_panel(int64_t rows, int64_t depth, LeftFactor<T> a, const T* b, Product<T> c) {
    for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t terms = depth - k < kDepth ? depth - k : kDepth;
        for (int64_t i = 0; i < rows; i += kTileRows<T>) {
            const int64_t group = i / kLanes<T>, within = i % kLanes<T>;
            LeftFactor<T> a_tile = a;
            a_tile.first += group * a.by_group + within * a.by_row + k / kLanes<T> * a.by_lanes;
            Product<T> c_tile = c;
            c_tile.first += group * c.by_group + within * c.by_row;
            matmul_tile<T, width>(terms, a_tile, b + k * width * kLanes<T>, c_tile, k > 0);
        }
    }
}

// C = A B for `rows` rows, rounded up to kTileRows.
template <typename T>
__attribute__((noinline)) void matmul(int64_t rows, int64_t depth, LeftFactor<T> a, const T* b, int64_t vectors,
                                      Product<T> c) {
    for (int64_t v = 0; v < vectors; v += kTileVectors<T>, c.first += kTileVectors<T> * c.by_vector) {
        const T* panel = b + panel_offset<T>(v / kTileVectors<T>, depth);
        switch (vectors - v) {
            case 1:
                matmul_panel<T, 1>(rows, depth, a, panel, c);
                break;
            case 2:
                matmul_panel<T, 2>(rows, depth, a, panel, c);
                break;
            default:
                matmul_panel<T, kTileVectors<T>>(rows, depth, a, panel, c);
                break;
        }
    }
}

}  // namespace PARROT_ISA
}  // namespace parrot
