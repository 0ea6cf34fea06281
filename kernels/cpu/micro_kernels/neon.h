// What the micro-kernels of NEON share.

#pragma once

#include "dot_steps.h"

namespace fusion_edge::SIMD {

template <int BITS>
constexpr size_t DOT_WIDTH = WORD;

// totals += float(sums) * scales * x_scale.
[[gnu::always_inline]] inline void add_scaled(Ints sums, Floats scales, const float* x_scale, float* totals) {
    store(totals, fma(to_floats(sums), mul(scales, broadcast(*x_scale)), load(totals)));
}

// sums += word * lanes, for a float32 of a row. Inline assembly: GCC loads the words of all rows first, and has no
// registers left for some sums.
template <bool BFLOAT16>
[[gnu::always_inline]] inline void multiply_add_row(
    Floats* sums, const Floats* lanes, size_t, const uint32_t* word) {
    static_assert(REGISTERS == 1);
    float32x4_t x;
    asm("ldr %s4, %9\n\tfmla %0.4s, %5.4s, %4.s[0]\n\tfmla %1.4s, %6.4s, %4.s[0]\n\t"
        "fmla %2.4s, %7.4s, %4.s[0]\n\tfmla %3.4s, %8.4s, %4.s[0]"
        : "+w"(sums->q[0]), "+w"(sums->q[1]), "+w"(sums->q[2]), "+w"(sums->q[3]), "=&w"(x)
        : "w"(lanes->q[0]), "w"(lanes->q[1]), "w"(lanes->q[2]), "w"(lanes->q[3]), "m"(*word));
}

}  // namespace fusion_edge::SIMD
