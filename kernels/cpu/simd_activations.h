// Activation functions of a register of 16 floats.

#pragma once

#include "simd.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {

constexpr float TWO_ROOT_TWO_OVER_PI = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float MIN_EXPONENT = -160;  // 2^-160 is 0 in float32; the bound keeps infinities out of exp2

// x / (1 + 2^-z), computed from 2^-|z|, which cannot overflow.
[[gnu::always_inline]] inline __m512 gate(__m512 x, __m512 z) {
    const __m512 one = _mm512_set1_ps(1), negative_size = _mm512_min_ps(z, _mm512_sub_ps(_mm512_setzero_ps(), z));
    const __m512 power = exp2(_mm512_max_ps(negative_size, _mm512_set1_ps(MIN_EXPONENT)));
    const __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 divisor = _mm512_add_ps(one, power), near = _mm512_rcp14_ps(divisor);
    const __m512 inverse = _mm512_mul_ps(near, _mm512_fnmadd_ps(divisor, near, _mm512_set1_ps(2)));  // Newton step
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_mask_mov_ps(one, negative, power)), inverse);
}

// x / (1 + e^(-slope x)).
[[gnu::always_inline]] inline __m512 swish(__m512 x, float slope) {
    return gate(x, _mm512_mul_ps(x, _mm512_set1_ps(slope * LOG2_E)));
}

// GELU in its tanh form; formula in activations.h.
[[gnu::always_inline]] inline __m512 gelu(__m512 x) {
    const __m512 linear = _mm512_set1_ps(TWO_ROOT_TWO_OVER_PI * LOG2_E);
    const __m512 cubic = _mm512_set1_ps(TWO_ROOT_TWO_OVER_PI * LOG2_E * 0.044715f);
    return gate(x, _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cubic, linear)));
}

}  // namespace fusion_edge

#pragma GCC pop_options
