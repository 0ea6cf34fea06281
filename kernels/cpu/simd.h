// Helpers for AVX-512 registers of 16 floats.

#pragma once

#ifndef __x86_64__
#error "The kernels need x86-64."
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {

constexpr size_t LANES = 16;
constexpr float LOG2_E = 1.44269504f;  // e^x = 2^(x log2 e)

inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Uninitialized memory, aligned to 64 bytes, that a thread reuses in its next call. It only grows.
template <typename T>
class Scratch {
  public:
    T* of(size_t count) {
        const size_t bytes = round_up(count * sizeof(T), 64);
        if (bytes > bytes_) {
            memory_.reset();  // before the allocation, to lower the peak
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            bytes_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> memory_;
    size_t bytes_ = 0;
};

// Mask of the first `count` lanes.
inline __mmask16 lane_mask(size_t count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }

// Loads 16 values as floats.
inline __m512 load(const float* values) { return _mm512_loadu_ps(values); }
inline __m512 load(const int8_t* values) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
}

// Loads the masked of 16 values as floats; the others are zero.
inline __m512 load(const float* values, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, values); }
inline __m512 load(const int8_t* values, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, values)));
}

// max(largest, |x|) per lane, for largest >= 0. Compares the bits as integers, which order magnitudes and put NaN last;
// _mm512_max_ps would drop a NaN.
inline __m512 max_abs(__m512 largest, __m512 x) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), _mm512_castps_si512(_mm512_abs_ps(x))));
}

// Largest lane of the results of max_abs.
inline float reduce_max_abs(__m512 magnitudes) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(magnitudes)))));
}

// Transposes a 16 x 16 matrix of 32-bit words, one register per row.
[[gnu::always_inline]] inline void transpose(__m512i* rows) {
    __m512i other[LANES];
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (size_t j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
        }
    // Quarter c of rows[4 a + b] now holds word 4 c + b of rows 4 a ... 4 a + 3.
#pragma GCC unroll 4
    for (size_t b = 0; b < 4; ++b) {
        const __m512i low = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xDD);
        const __m512i high_odd = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xDD);
        other[b] = _mm512_shuffle_i32x4(low, high, 0x88);
        other[4 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        other[8 + b] = _mm512_shuffle_i32x4(low, high, 0xDD);
        other[12 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) rows[i] = other[i];
}

// 2^x for x <= 0 with a relative error of 1e-7: 2^round(x) times the minimax polynomial of degree 5 of 2^f, |f| <= 1/2.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(0.00132764716f);
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.00967554133f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.0555071327f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.240221197f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.693146967f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(1.00000007f));
    return _mm512_scalef_ps(power, whole);
}

}  // namespace fusion_edge

#pragma GCC pop_options
