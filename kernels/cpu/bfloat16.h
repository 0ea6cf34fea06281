// Rounding to bfloat16, the upper half of a float32.

#pragma once

#include "simd.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {

// 32 floats as bfloat16, rounded to nearest even. Inline assembly: other files run on processors without it.
inline __m512i to_bfloat16(__m512 low, __m512 high) {
    __m512i rounded;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(low), "v"(high));
    return rounded;
}

// Words of two bfloat16: lane i of `low` and lane i of `high`.
[[gnu::always_inline]] inline __m512i bfloat16_pairs(__m512 low, __m512 high) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i indices = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(indices, to_bfloat16(low, high));
}

// sums + both bfloat16 of each word.
[[gnu::always_inline]] inline __m512 add_bfloat16_pairs(__m512 sums, __m512i words) {
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(words), "v"(ones));
    return sums;
}

}  // namespace fusion_edge

#pragma GCC pop_options
