// What the kernels share for work on registers of 16 floats.

#pragma once

#ifndef __x86_64__
#error "These kernels are written for x86-64."
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

// Memory that a thread keeps for its next call. It only grows.
template <typename T>
class Scratch {
  public:
    T* of(size_t count) {
        const size_t bytes = round_up(count * sizeof(T), 64);
        if (bytes > bytes_) {
            memory_.reset();  // first: what it holds is not needed
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

inline __mmask16 first(size_t count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }

// 16 values as floats.
inline __m512 load(const float* values) { return _mm512_loadu_ps(values); }
inline __m512 load(const int8_t* values) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
}

// Some of 16 values as floats, zero elsewhere.
inline __m512 load(const float* values, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, values); }
inline __m512 load(const int8_t* values, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, values)));
}

// 2^x for x <= 0, relative error 1e-7: the polynomial is the one of its degree that is closest to 2^f, |f| <= 1/2.
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
