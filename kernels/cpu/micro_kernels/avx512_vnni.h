// Micro-kernels of AVX-512 VNNI. Inline assembly: with intrinsics GCC 12 copies each accumulator and keeps totals in
// two places.

#pragma once

#include "vnni.h"

namespace fusion_edge::SIMD {

// vpdpbusd takes the unsigned operand first.
template <int BITS, bool UNSIGNED_X>
[[gnu::always_inline]] inline void dot_row(
    Ints (&sums)[REGISTERS], const Bytes (&weights)[REGISTERS], const int8_t* word) {
    const int32_t& four = *reinterpret_cast<const int32_t*>(word);
    Ints inputs;
    if constexpr (UNSIGNED_X)
        asm("vpbroadcastd %7, %3\n\tvpdpbusd %4, %3, %0\n\tvpdpbusd %5, %3, %1\n\tvpdpbusd %6, %3, %2"
            : "+&v"(sums[0]), "+&v"(sums[1]), "+&v"(sums[2]), "=&v"(inputs)
            : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(four));
    else
        asm("vpbroadcastd %7, %3\n\tvpdpbusd %3, %4, %0\n\tvpdpbusd %3, %5, %1\n\tvpdpbusd %3, %6, %2"
            : "+&v"(sums[0]), "+&v"(sums[1]), "+&v"(sums[2]), "=&v"(inputs)
            : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(four));
}

// totals += float(sums) * scales * x_scale.
[[gnu::always_inline]] inline void add_scaled(Ints sums, Floats scales, const float* x_scale, float* totals) {
    Floats product;
    asm("vmulps %4%{1to16%}, %3, %2\n\tvcvtdq2ps %0, %0\n\tvfmadd213ps %1, %2, %0\n\tvmovaps %0, %1"
        : "+v"(sums), "+m"(*reinterpret_cast<float(*)[LANES]>(totals)), "=&v"(product)
        : "v"(scales), "m"(*x_scale));
}

// sums += word * lanes, for a word of a row that is broadcast: a float32, or with BFLOAT16 two bfloat16.
template <bool BFLOAT16>
[[gnu::always_inline]] inline void multiply_add_row(
    Floats* sums, const Floats* lanes, size_t registers, const uint32_t* word) {
    Floats words;
    asm("vbroadcastss %1, %0" : "=v"(words) : "m"(*word));
#pragma GCC unroll 3
    for (size_t i = 0; i < registers; ++i)
        if constexpr (BFLOAT16) asm("vdpbf16ps %2, %1, %0" : "+v"(sums[i]) : "v"(lanes[i]), "v"(words));
        else asm("vfmadd231ps %2, %1, %0" : "+v"(sums[i]) : "v"(lanes[i]), "v"(words));
}

}  // namespace fusion_edge::SIMD
