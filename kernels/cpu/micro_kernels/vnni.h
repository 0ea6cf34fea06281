// What vpdpbusd of any width reads: words of four bytes.

#pragma once

#include "dot_steps.h"

namespace fusion_edge::SIMD {

template <int BITS>
[[gnu::always_inline]] inline void store_words(uint8_t* to, size_t step_bytes, Bytes first, Bytes second, bool) {
    store_bytes(to, first);
    store_bytes(to + step_bytes, second);
}

template <int BITS, bool UNSIGNED_X, size_t... I>
[[gnu::always_inline]] inline void dot_steps(
    std::index_sequence<I...> rows, Ints (&sums)[sizeof...(I)][REGISTERS], const uint8_t*& weights, const int8_t*& x,
    size_t steps, NextTile& next) {
    dot_words<BITS, UNSIGNED_X>(rows, sums, weights, x, steps, next);
}

}  // namespace fusion_edge::SIMD
