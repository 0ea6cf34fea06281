// The two ways of a product.

#pragma once

#include "lanes.h"
#include "rounding.h"

namespace fusion_edge {

constexpr size_t CHUNK = 64;  // bytes of weights that are read at a time

// Products of one row, and of many in tiles.
void multiply_row(const Rounded& rounded, const Weights& weights, float* result, const Parallel& parallel);
void multiply_rows(
    const Rounded& rounded, size_t rows, const Weights& weights, float* result, const Parallel& parallel);

// Many rows whose GELU the next product takes, rounded as was given for its inputs: those, in memory that the calling
// thread keeps. Missing rows of the last tile hold anything.
Rounded multiply_rows_for(
    const Rounded& rounded, size_t rows, const Weights& weights, const GivenRounding& given, const Parallel& parallel);

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

// 16 scales from a place on, zero where there is none.
[[gnu::always_inline]] inline __m512 scales(const Weights& weights, size_t place, __mmask16 mask) {
    if (!weights.half_scales) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(weights.scales) + place);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(weights.scales) + place));
}

#pragma GCC pop_options

}  // namespace fusion_edge
