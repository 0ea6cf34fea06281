// Micro-kernel of NEON by smmla: two rows of eight bytes times two outputs.

#pragma once

namespace fusion_edge::SIMD {

constexpr size_t WORD = 8;  // bytes of a row or an output that smmla multiplies and adds

}  // namespace fusion_edge::SIMD

#include "neon.h"

namespace fusion_edge::SIMD {

template <int BITS>
[[gnu::always_inline]] inline void store_words(uint8_t* to, size_t, Bytes first, Bytes second, bool is_signed) {
    if (BITS == 8 && !is_signed) {
        first = less_offset(first);
        second = less_offset(second);
    }
    int32_t* const words = reinterpret_cast<int32_t*>(to);
    for (size_t i = 0; i < 4; ++i) {
        vst1q_s32(words + 2 * i * QUARTER, vzip1q_s32(first.q[i], second.q[i]));
        vst1q_s32(words + (2 * i + 1) * QUARTER, vzip2q_s32(first.q[i], second.q[i]));
    }
}

// Exchanges the second half of `a` and the first half of `b`: turns two outputs of two rows each into 2 x 2 matrices,
// and those into rows.
[[gnu::always_inline]] inline void exchange_halves(int32x4_t& a, int32x4_t& b) {
    const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
    a = vreinterpretq_s32_s64(vtrn1q_s64(x, y));
    b = vreinterpretq_s32_s64(vtrn2q_s64(x, y));
}
[[gnu::always_inline]] inline void exchange_halves(Ints& a, Ints& b) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) exchange_halves(a.q[i], b.q[i]);
}

template <int BITS, bool UNSIGNED_X, size_t... I>
[[gnu::always_inline]] inline void dot_steps(
    std::index_sequence<I...>, Ints (&sums)[sizeof...(I)][REGISTERS], const uint8_t*& weights, const int8_t*& x,
    size_t steps, NextTile& next) {
    constexpr size_t ROWS = sizeof...(I);
    Ints pairs[TILE_ROWS];  // the last of an odd number of rows has a second one that is not used
    ((pairs[I] = sums[I][0]), ...);
    if constexpr (ROWS % 2) pairs[ROWS] = zero_bytes();
#pragma GCC unroll 3
    for (size_t i = 0; i < ROWS; i += 2) exchange_halves(pairs[i], pairs[i + 1]);
    for (size_t step = 0; step < steps; ++step, x += TILE_ROWS * WORD) {
        int8x16_t rows[TILE_ROWS / 2];
#pragma GCC unroll 3
        for (size_t i = 0; i < ROWS; i += 2) rows[i / 2] = vld1q_s8(x + i * WORD);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j, weights += 4 * WORD) {  // four outputs
            const int8_t* four = reinterpret_cast<const int8_t*>(weights);
            const int8x16_t even = vld1q_s8(four), odd = vld1q_s8(four + 2 * WORD);
#pragma GCC unroll 3
            for (size_t i = 0; i < ROWS; i += 2) {
                pairs[i].q[j] = vmmlaq_s32(pairs[i].q[j], rows[i / 2], even);
                pairs[i + 1].q[j] = vmmlaq_s32(pairs[i + 1].q[j], rows[i / 2], odd);
            }
            // Keeps later loads after these sums: GCC would load all weights first, and has too few registers.
            asm("" : "+r"(weights), "+w"(pairs[(ROWS - 1) | 1].q[j]));
        }
        next.prefetch();
    }
#pragma GCC unroll 3
    for (size_t i = 0; i < ROWS; i += 2) exchange_halves(pairs[i], pairs[i + 1]);
    ((sums[I][0] = pairs[I]), ...);
}

}  // namespace fusion_edge::SIMD
