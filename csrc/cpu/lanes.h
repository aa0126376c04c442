// Channels as vector lanes: functions on vectors of channels, elements of every dtype, and tiles (steps x lanes) moved
// to and from strided tensors. Everything is in the namespace of the instruction set, as in simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "simd.h"
#include "tensor_rows.h"

namespace parrot {
namespace PARROT_ISA {

#if defined(__AVX512F__)
alignas(64) constexpr float kPowers[2 * kLanes<float>] = {
    // 2^(i / 32)
    1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f, 1.16372486f,
    1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f,
    1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f, 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
#endif

// 2^x to 2e-7 and exact at 0, two thirds of the work of exp in simd.h: the scan does little else. 2^x = 2^n 2^f with n
// the nearest integer, or, where a shuffle looks up 32 numbers, the nearest multiple of 1 / 32, which saves two
// multiply-adds. FlushDenormals keeps the smallest results zero.
PARROT_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
    constexpr float c1 = 0.6931573f, c2 = 0.24022874f, round = Exponent<float>::round / 32;
    const Vec<float> shifted = x + round, n = shifted - round, f = x - n;
    const Vec<float> power =
        _mm512_permutex2var_ps(load(kPowers), bit_cast<__m512i>(shifted), load(kPowers + kLanes<float>));
    const Vec<float> p = (c2 * f + c1) * (power * f) + power;
    return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
    constexpr float c1 = 0.6931470616f, c2 = 0.2402223532f, c3 = 0.05550678369f, c4 = 0.00967196168f,
                    c5 = 0.001327463337f;
    constexpr float low = -125.4f, high = 127.4f;  // the result stays a normal number; a NaN stays one
    x = vmin(broadcast(high), vmax(broadcast(low), x));
    const Vec<float> shifted = x + Exponent<float>::round, f = x - (shifted - Exponent<float>::round);
    const Vec<float> p = ((((c5 * f + c4) * f + c3) * f + c2) * f + c1) * f + 1.0f;
    return bit_cast<Vec<float>>(bit_cast<BitVec<float>>(p) +
                                (bit_cast<BitVec<float>>(shifted) << Exponent<float>::mantissa_bits));
#endif
}
PARROT_INLINE Vec<double> exp2(Vec<double> x) { return exp<double>(x * 0.69314718055994530942); }

// log(1 + w) for 0 <= w <= 1, with small relative error throughout.
PARROT_INLINE Vec<float> log1p_unit(Vec<float> w) {
    const Vec<float> s = w / (2.0f + w), s2 = s * s;
    return 2.0f * s * (1.0f + s2 * (0.3333326897f + s2 * (0.2000724447f + s2 * (0.140545475f + s2 * 0.1376694138f))));
}
PARROT_INLINE Vec<double> log1p_unit(Vec<double> w) { return log1p<double>(w); }

template <typename F>
constexpr F kLog2e = F(1.4426950408889634);

// log(1 + exp(x)), the identity above torch's threshold, and its derivative.
template <typename F>
PARROT_INLINE Vec<F> softplus(Vec<F> x, Vec<F>& slope) {
    const Vec<F> magnitude = x < 0 ? -x : x, one = broadcast(F(1));
    const Vec<F> positive = x > 0 ? x : Vec<F>{};
    const Vec<F> w = exp2(-magnitude * kLog2e<F>);
    const Vec<F> y = positive + log1p_unit(w);
    slope = x > F(20) ? one : (x > 0 ? one : w) / (F(1) + w);
    return x > F(20) ? x : y;
}
template <typename F>
PARROT_INLINE Vec<F> softplus(Vec<F> x) {
    Vec<F> slope;
    return softplus<F>(x, slope);
}
template <typename F>
PARROT_INLINE Vec<F> sigmoid(Vec<F> x) {
    return F(1) / (F(1) + exp2(-x * kLog2e<F>));
}

// Results below the normal range become zero while this lives: denormals would cost a hundred cycles each.
class FlushDenormals {
#if defined(__SSE2__)
  public:
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
  public:
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
};

// Memory of the calling thread for Buffers, the last one taken given back first. It outlives them: fresh pages cost
// more than the work done in them.
class ScratchStack {
  public:
    char* push(size_t bytes) {
        if (held_ == 0) {
            memory_ = arena_.reserve(wanted_ > bytes ? wanted_ : bytes <= Arena::kKeep ? bytes : 1);
            if (memory_) forbid(memory_, arena_.capacity());
        }
        const size_t start = held_;
        held_ += bytes;
        if (held_ <= Arena::kKeep && held_ > wanted_) wanted_ = held_;  // for the next time
        const bool fits = memory_ && held_ <= arena_.capacity();
        char* const data = fits ? memory_ + start : static_cast<char*>(std::aligned_alloc(64, bytes));
        if (!data) held_ = start;
        if (fits) permit(data, bytes);
        return data;
    }
    void pop(char* data, size_t bytes) {
        const bool on_stack = memory_ && held_ <= arena_.capacity();
        held_ -= bytes;
        on_stack ? forbid(data, bytes) : std::free(data);
    }

  private:
    Arena arena_;
    char* memory_ = nullptr;
    size_t held_ = 0, wanted_ = 1;
};

inline ScratchStack& scratch_stack() {
    static thread_local ScratchStack stack;
    return stack;
}

// Uninitialised memory aligned to a cache line, of the thread that makes it; others may use it. (std::vector's weak
// symbols would be shared by the instruction sets.)
template <typename F>
class Buffer {
  public:
    explicit Buffer(int64_t size) : bytes_((static_cast<size_t>(size) * sizeof(F) + 127) / 64 * 64) {
        data_ = reinterpret_cast<F*>(scratch_stack().push(bytes_));
        if (!data_) throw std::bad_alloc();
        forbid(data_ + size, bytes_ - static_cast<size_t>(size) * sizeof(F));
    }
    ~Buffer() { scratch_stack().pop(reinterpret_cast<char*>(data_), bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    F* get() const { return data_; }
    F& operator[](int64_t i) const { return data_[i]; }

  private:
    size_t bytes_;
    F* data_;
};

// For outputs. Smaller ones glibc takes from memory that it keeps, where asking was slower more often than not.
inline void prefer_huge_pages(const TensorView& view) {
    constexpr int64_t kMapped = int64_t{32} << 20;  // the most that glibc does not map anew for every call
    int64_t bytes = !view ? 0 : view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2;
    for (int i = 0; i < view.ndim; ++i) bytes *= view.size[i];
    if (bytes >= kMapped) prefer_huge_pages(view.data, static_cast<size_t>(bytes));
}

template <typename F>
inline void clear(F* data, int64_t count) {
    std::memset(static_cast<void*>(data), 0, sizeof(F) * static_cast<size_t>(count));
}

// Elements of 16 bits as they lie in tensors.
struct half {
    uint16_t bits = 0;
};
struct bfloat16 {
    uint16_t bits = 0;
};

template <typename F, typename T>
PARROT_INLINE F to_real(T x) {
    if constexpr (std::is_same<T, half>::value)
        return from_f16(x.bits);
    else if constexpr (std::is_same<T, bfloat16>::value)
        return from_bf16(x.bits);
    else
        return x;
}
template <typename T, typename F>
PARROT_INLINE T from_real(F x) {
    if constexpr (std::is_same<T, half>::value)
        return {to_f16(x)};
    else if constexpr (std::is_same<T, bfloat16>::value)
        return {to_bf16(x)};
    else
        return x;
}

// kLanes<F> elements of T in the compute dtype, and back.
template <typename T, typename F>
PARROT_INLINE Vec<F> load_as(const T* p) {
    constexpr int W = kLanes<F>;
    if constexpr (sizeof(T) == sizeof(F)) {
        return load(reinterpret_cast<const F*>(p));
#if defined(__AVX512F__)
    } else if constexpr (std::is_same<T, half>::value) {
        return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    } else if constexpr (std::is_same<T, half>::value) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
    } else if constexpr (std::is_same<T, bfloat16>::value) {
        typedef uint16_t Bits __attribute__((vector_size(2 * W)));
        Bits bits;
        std::memcpy(&bits, p, sizeof(bits));
        return bit_cast<Vec<F>>(__builtin_convertvector(bits, BitVec<F>) << 16);
    } else {
        F converted[W];
        for (int i = 0; i < W; ++i) converted[i] = to_real<F>(p[i]);
        return load(converted);
    }
}
template <typename T, typename F>
PARROT_INLINE void store_as(T* p, Vec<F> v) {
    constexpr int W = kLanes<F>;
    if constexpr (sizeof(T) == sizeof(F)) {
        store(reinterpret_cast<F*>(p), v);
#if defined(__AVX512F__)
    } else if constexpr (std::is_same<T, half>::value) {
        const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__F16C__)
    } else if constexpr (std::is_same<T, half>::value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
    } else if constexpr (std::is_same<T, bfloat16>::value) {  // as to_bf16
        typedef uint16_t Bits __attribute__((vector_size(2 * W)));
        const BitVec<F> bits = bit_cast<BitVec<F>>(v);
        const BitVec<F> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const BitVec<F> chosen = (bits & 0x7fffffff) > 0x7f800000 ? ((bits >> 16) | 0x40) : rounded;
        const Bits narrow = __builtin_convertvector(chosen, Bits);
        std::memcpy(p, &narrow, sizeof(narrow));
    } else {
        for (int i = 0; i < W; ++i) p[i] = from_real<T, F>(v[i]);
    }
}

// The same for the first `count` lanes only; the others are zero.
template <typename T, typename F>
PARROT_INLINE Vec<F> load_some(const T* p, int count) {
    if (count == kLanes<F>) return load_as<T, F>(p);
    T padded[kLanes<F>] = {};
    for (int i = 0; i < count; ++i) padded[i] = p[i];
    return load_as<T, F>(padded);
}
template <typename T, typename F>
PARROT_INLINE void store_some(T* p, Vec<F> v, int count) {
    if (count == kLanes<F>) return store_as<T, F>(p, v);
    T padded[kLanes<F>];
    store_as<T, F>(padded, v);
    for (int i = 0; i < count; ++i) p[i] = padded[i];
}

// The dtype T of inputs and the compute dtype F that goes with it, called as function(T{}, F{}).
template <typename Function>
inline void for_dtype(DType dtype, Function&& function) {
    switch (dtype) {
        case DType::f64:
            return function(double{}, double{});
        case DType::f16:
            return function(half{}, float{});
        case DType::bf16:
            return function(bfloat16{}, float{});
        default:
            return function(float{}, float{});
    }
}

// A run of scan steps of up to kLanes channels of a (channel, time) plane. Step s lies at time first + s, or, in
// reverse, first - s.
struct Strip {
    int64_t channel_stride, time_stride;
    int channels;
    int64_t first;
    int steps;
    bool reverse;

    int64_t offset(int channel, int step) const {
        return channel * channel_stride + (first + (reverse ? -step : step)) * time_stride;
    }
};

// tile[step][lane] from a plane; the lanes of absent channels become zero.
template <typename T, typename F>
inline void load_tile(F* tile, const T* plane, const Strip& strip) {
    constexpr int lanes = kLanes<F>;
    int step = 0;
    if (strip.channel_stride == 1 && strip.channels == lanes) {
        for (; step < strip.steps; ++step) store(tile + step * lanes, load_as<T, F>(plane + strip.offset(0, step)));
        return;
    }
    if (strip.channels < lanes) std::memset(static_cast<void*>(tile), 0, sizeof(F) * lanes * strip.steps);
    if (strip.time_stride == 1) {
        for (; step + lanes <= strip.steps; step += lanes) {
            Vec<F> rows[lanes];
            const int64_t low = strip.reverse ? strip.first - step - (lanes - 1) : strip.first + step;
            for (int c = 0; c < lanes; ++c) {
                if (c >= strip.channels) {
                    rows[c] = Vec<F>{};
                    continue;
                }
                rows[c] = load_as<T, F>(plane + c * strip.channel_stride + low);
            }
            transpose<F>(rows);
            for (int i = 0; i < lanes; ++i) store(tile + (step + (strip.reverse ? lanes - 1 - i : i)) * lanes, rows[i]);
        }
    }
    for (; step < strip.steps; ++step)
        for (int c = 0; c < strip.channels; ++c) tile[step * lanes + c] = to_real<F>(plane[strip.offset(c, step)]);
}

// The opposite of load_tile; the lanes of absent channels are dropped.
template <typename T, typename F>
inline void store_tile(T* plane, const F* tile, const Strip& strip) {
    constexpr int lanes = kLanes<F>;
    int step = 0;
    if (strip.channel_stride == 1 && strip.channels == lanes) {
        for (; step < strip.steps; ++step) store_as<T, F>(plane + strip.offset(0, step), load(tile + step * lanes));
        return;
    }
    if (strip.time_stride == 1) {
        for (; step + lanes <= strip.steps; step += lanes) {
            Vec<F> rows[lanes];
            for (int i = 0; i < lanes; ++i) rows[i] = load(tile + (step + (strip.reverse ? lanes - 1 - i : i)) * lanes);
            transpose<F>(rows);
            const int64_t low = strip.reverse ? strip.first - step - (lanes - 1) : strip.first + step;
            for (int c = 0; c < strip.channels; ++c) store_as<T, F>(plane + c * strip.channel_stride + low, rows[c]);
        }
    }
    for (; step < strip.steps; ++step)
        for (int c = 0; c < strip.channels; ++c) plane[strip.offset(c, step)] = from_real<T, F>(tile[step * lanes + c]);
}

// Asks for the strips of a coming tile, a few cache lines at a time: the dozens of rows of a tile are more streams than
// the processor's own prefetcher follows.
class Prefetch {
  public:
    template <typename T>
    void add(const T* plane, const Strip& strip) {
        if (count_ == kPlanes || strip.steps <= 0) return;
        Plane& p = planes_[count_++];
        const bool by_channel = strip.time_stride == 1;
        const int64_t low = strip.reverse ? strip.steps - 1 : 0;
        p.address = reinterpret_cast<const char*>(plane + strip.offset(0, static_cast<int>(low)));
        p.stride = (by_channel ? strip.channel_stride : strip.time_stride) * static_cast<int64_t>(sizeof(T));
        p.rows = by_channel ? strip.channels : strip.steps;
        p.bytes = (by_channel ? strip.steps : strip.channels) * static_cast<int>(sizeof(T));
        lines_ += p.rows * ((p.bytes + 126) / 64);
    }
    int lines() const { return lines_; }
    PARROT_INLINE void next(int lines) {
        for (; lines > 0 && plane_ < count_; --lines) {
            const Plane& p = planes_[plane_];
            __builtin_prefetch(p.address + row_ * p.stride + (byte_ < p.bytes ? byte_ : p.bytes - 1), 0, 2);
            byte_ += 64;
            if (byte_ >= p.bytes + 63) {
                byte_ = 0;
                if (++row_ == p.rows) row_ = 0, ++plane_;
            }
        }
    }

  private:
    struct Plane {
        const char* address;
        int64_t stride;
        int rows, bytes;
    };
    static constexpr int kPlanes = 8;
    Plane planes_[kPlanes];
    int count_ = 0, lines_ = 0, plane_ = 0, row_ = 0, byte_ = 0;
};

template <typename T>
inline void zero_times(T* plane, int64_t channel_stride, int64_t time_stride, int channels, int64_t from, int64_t to) {
    for (int c = 0; c < channels; ++c)
        for (int64_t t = from; t < to; ++t) plane[c * channel_stride + t * time_stride] = T{};
}

}  // namespace PARROT_ISA
}  // namespace parrot
