// Micro-kernel of NEON by dot products.

#pragma once

namespace fusion_edge::SIMD {

constexpr size_t WORD = 4;  // bytes that sdot multiplies and adds per lane

}  // namespace fusion_edge::SIMD

#include "neon.h"

namespace fusion_edge::SIMD {

template <int BITS>
[[gnu::always_inline]] inline void store_words(
    uint8_t* to, size_t step_bytes, Bytes first, Bytes second, bool is_signed) {
    const bool has_offset = BITS == 8 && !is_signed;
    store_bytes(to, has_offset ? less_offset(first) : first);
    store_bytes(to + step_bytes, has_offset ? less_offset(second) : second);
}

template <int LANE>
[[gnu::always_inline]] inline void dot_row(Ints& sums, const Bytes& weights, int8x16_t x) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) sums.q[i] = vdotq_laneq_s32(sums.q[i], as_bytes(weights.q[i]), x, LANE);
}

template <int BITS, bool UNSIGNED_X, size_t... I>
[[gnu::always_inline]] inline void dot_steps(
    std::index_sequence<I...>, Ints (&sums)[sizeof...(I)][REGISTERS], const uint8_t*& weights, const int8_t*& x,
    size_t steps, NextTile& next) {
    static_assert(TILE_ROWS == 6);
    for (size_t step = 0; step < steps; ++step, weights += sizeof(Bytes), x += TILE_ROWS * WORD) {
        const Bytes words = load_bytes(weights);
        const int8x16_t four_rows = vld1q_s8(x), two_rows = vcombine_s8(vld1_s8(x + 4 * WORD), vdup_n_s8(0));
        (dot_row<I % 4>(sums[I][0], words, I < 4 ? four_rows : two_rows), ...);
        next.prefetch();
    }
}

}  // namespace fusion_edge::SIMD
