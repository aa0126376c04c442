// Vectors of the widest registers of the instruction set being compiled for, as GCC and Clang vector types: the same
// source for every instruction set and for fp32 and fp64. Arithmetic, comparisons and `mask ? a : b` are operators.
//
// Everything here lives in the namespace of its instruction set (cpu/dispatch.h), so that the linker can't merge
// inline functions across them. For the same reason CPU kernels use no containers of the standard library.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef PARROT_ISA
#define PARROT_ISA v2
#endif

#define PARROT_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define PARROT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PARROT_UNROLL _Pragma("GCC unroll 32")
#endif

namespace parrot {
namespace PARROT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kAlignment = 64;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
    typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using IntVec = typename VectorOf<T>::ints;  // same lanes as Vec<T>; comparisons give it, 0 or -1
template <typename T>
using BitVec = typename VectorOf<T>::bits;  // for sums that may wrap, as those of lanes that are then dropped

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
constexpr int64_t round_up(int64_t n) {
    return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
PARROT_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

template <typename T>
PARROT_INLINE void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
PARROT_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{};  // unlike a sum with 0, exactly `value`, so that it compiles to one load
}

template <typename To, typename From>
PARROT_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

// Of a NaN and a number: the second argument.
template <typename V>
PARROT_INLINE V vmax(V a, V b) {
    return a > b ? a : b;
}
template <typename V>
PARROT_INLINE V vmin(V a, V b) {
    return a < b ? a : b;
}

template <typename T>
PARROT_INLINE Vec<T> sqrt_each(Vec<T> v) {
    T lanes[kLanes<T>];
    store(lanes, v);
    PARROT_UNROLL
    for (int i = 0; i < kLanes<T>; ++i)
        lanes[i] = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(lanes[i])))
                                  : static_cast<T>(__builtin_sqrt(static_cast<double>(lanes[i])));
    return load(lanes);
}

template <typename V>
PARROT_INLINE bool any(V mask) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return _mm512_movepi32_mask(bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8(bit_cast<__m256i>(mask)) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_epi8(bit_cast<__m128i>(mask)) != 0;
#else
    uint64_t words[sizeof(V) / 8], all = 0;
    __builtin_memcpy(words, &mask, sizeof(mask));
    for (uint64_t word : words) all |= word;
    return all != 0;
#endif
}

// Sums over the lanes, pairwise, in the same order everywhere.
template <typename T>
PARROT_INLINE T sum_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    store(lanes, v);
    PARROT_UNROLL
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <typename T>
PARROT_INLINE T max_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    store(lanes, v);
    PARROT_UNROLL
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

namespace detail {

// Of two vectors cut into blocks of `2 * half` lanes: the blocks' first (second) halves, a's and b's taking turns.
template <typename T, int half, bool second>
PARROT_INLINE Vec<T> halves(Vec<T> a, Vec<T> b) {
    IntVec<T> index;
    PARROT_UNROLL
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int block = lane / (2 * half) * (2 * half), within = lane % (2 * half);
        index[lane] = block + within % half + (second ? half : 0) + (within >= half ? kLanes<T> : 0);
    }
#if defined(__clang__)
    Vec<T> out;
    PARROT_UNROLL
    for (int lane = 0; lane < kLanes<T>; ++lane)
        out[lane] = index[lane] < kLanes<T> ? a[index[lane]] : b[index[lane] - kLanes<T>];
    return out;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

template <typename T, int half>
struct Fold {
    // rows[i], rows[i + half] -> one vector; when half is 1 what is left is the vector of all sums.
    static PARROT_INLINE Vec<T> run(Vec<T>* rows) {
        PARROT_UNROLL
        for (int i = 0; i < half; ++i)
            rows[i] = halves<T, half, false>(rows[i], rows[i + half]) + halves<T, half, true>(rows[i], rows[i + half]);
        return Fold<T, half / 2>::run(rows);
    }
};
template <typename T>
struct Fold<T, 0> {
    static PARROT_INLINE Vec<T> run(Vec<T>* rows) { return rows[0]; }
};

template <typename T, int half>
struct Transpose {
    static PARROT_INLINE void run(Vec<T>* rows) {
        PARROT_UNROLL
        for (int i = 0; i < kLanes<T>; ++i) {
            if (i & half) continue;
            const Vec<T> a = rows[i], b = rows[i + half];
            rows[i] = halves<T, half, false>(a, b);
            rows[i + half] = halves<T, half, true>(a, b);
        }
        Transpose<T, half / 2>::run(rows);
    }
};
template <typename T>
struct Transpose<T, 0> {
    static PARROT_INLINE void run(Vec<T>*) {}
};

}  // namespace detail

// Lane i of the result is the sum over the lanes of rows[i]; rows has kLanes<T> vectors and is overwritten.
template <typename T>
PARROT_INLINE Vec<T> sum_each(Vec<T>* rows) {
    return detail::Fold<T, kLanes<T> / 2>::run(rows);
}

// In place, kLanes<T> vectors.
template <typename T>
PARROT_INLINE void transpose(Vec<T>* rows) {
    detail::Transpose<T, kLanes<T> / 2>::run(rows);
}

template <typename T>
struct Exponent;
template <>
struct Exponent<float> {
    static constexpr int mantissa_bits = 23;
    static constexpr float tiny = 1.17549435e-38f;              // the smallest normal number
    static constexpr float round = 12582912.0f;                 // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float lowest = -87.33f, highest = 88.37f;  // exp stays normal between
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr int exp_terms = 5;  // minimax, of (e^r - 1 - r) / r^2, highest first; |r| <= ln(2) / 2
    static constexpr float exp_poly[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    static constexpr int log_terms = 4;  // of (atanh(s) - s) / s^3, s = (m - 1) / (m + 1), |s| <= 0.1716
};
template <>
struct Exponent<double> {
    static constexpr int mantissa_bits = 52;
    static constexpr double tiny = 2.2250738585072014e-308;
    static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double lowest = -708.39, highest = 709.43;
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    static constexpr int exp_terms = 11;  // the Taylor series
    static constexpr double exp_poly[] = {1.6059043836821613e-10, 2.08767569878681e-09,   2.505210838544172e-08,
                                          2.755731922398589e-07,  2.7557319223985893e-06, 2.48015873015873e-05,
                                          1.984126984126984e-04,  1.388888888888889e-03,  8.333333333333333e-03,
                                          4.1666666666666664e-02, 1.6666666666666666e-01, 0.5};
    static constexpr int log_terms = 10;
};

// e^x to about 1 ulp. Zero below Exponent<T>::lowest, where denormals would begin; above `highest`, e^highest. NaN
// stays NaN.
template <typename T>
PARROT_INLINE Vec<T> exp(Vec<T> x) {
    using E = Exponent<T>;
    x = E::highest < x ? broadcast(E::highest) : x;
    const Vec<T> shifted = x * static_cast<T>(1.4426950408889634) + E::round;
    const Vec<T> n = shifted - E::round;
    const Vec<T> r = (x - n * E::ln2_high) - n * E::ln2_low;
    Vec<T> p = broadcast(E::exp_poly[0]);
    PARROT_UNROLL
    for (int i = 1; i <= E::exp_terms; ++i) p = p * r + E::exp_poly[i];
    p = p * (r * r) + r + T(1);
    // The low bits of `shifted` hold n; the shift drops the rest.
    const BitVec<T> scaled = bit_cast<BitVec<T>>(p) + (bit_cast<BitVec<T>>(shifted) << E::mantissa_bits);
    return x < E::lowest ? Vec<T>{} : bit_cast<Vec<T>>(scaled);
}

// log x to about 1 ulp for positive normal x; log 0 = -infinity, and NaN for negative numbers. Infinity and NaN stay.
template <typename T>
PARROT_INLINE Vec<T> log(Vec<T> x) {
    using E = Exponent<T>;
    const T infinity = __builtin_huge_valf();
    const Vec<T> given = x;
    const T lift = static_cast<T>(int64_t{1} << (E::mantissa_bits + 1));  // makes denormals normal
    const IntVec<T> small = x < E::tiny;
    x = small ? x * lift : x;
    const BitVec<T> bits = bit_cast<BitVec<T>>(x);
    // The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)).
    const BitVec<T> root = bit_cast<BitVec<T>>(broadcast(static_cast<T>(0.70710678118654752)));
    const IntVec<T> e = bit_cast<IntVec<T>>(bits - root) >> E::mantissa_bits;
    const Vec<T> m = bit_cast<Vec<T>>(bits - (bit_cast<BitVec<T>>(e) << E::mantissa_bits));
    const Vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
    Vec<T> p = broadcast(T(1) / (2 * E::log_terms + 1));
    PARROT_UNROLL
    for (int i = E::log_terms - 1; i >= 1; --i) p = p * s2 + T(1) / (2 * i + 1);
    Vec<T> exponent = __builtin_convertvector(e, Vec<T>);
    exponent = small ? exponent - T(E::mantissa_bits + 1) : exponent;
    const Vec<T> doubled = s + s;
    Vec<T> result = exponent * E::ln2_high + (doubled + (doubled * s2 * p + exponent * E::ln2_low));
    result = given == T(0) ? broadcast(-infinity) : result;
    result = given < T(0) ? broadcast(static_cast<T>(__builtin_nanf(""))) : result;
    return given < infinity ? result : given;
}

// log(1 + x), also for small x.
template <typename T>
PARROT_INLINE Vec<T> log1p(Vec<T> x) {
    const Vec<T> u = x + T(1);
    const Vec<T> lost = x - (u - T(1));
    const Vec<T> result = log<T>(u) + lost / u;
    return x < static_cast<T>(__builtin_huge_valf()) ? result : x;
}

template <typename T>
PARROT_INLINE T exp_one(T x) {
    return exp<T>(broadcast(x))[0];
}
template <typename T>
PARROT_INLINE T log_one(T x) {
    return log<T>(broadcast(x))[0];
}

}  // namespace PARROT_ISA
}  // namespace parrot
