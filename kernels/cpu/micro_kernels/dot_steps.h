// What the integer micro-kernels share.

#pragma once

namespace fusion_edge::SIMD {

// Prefetch of the next tile of rows, a few bytes in each step. Without it, rows outside of the L2 cache arrive late;
// prefetched all at once, they delay the current loads.
struct NextTile {
    const int8_t* values;
    size_t stride;  // bytes a step

    [[gnu::always_inline]] void prefetch() {
        __builtin_prefetch(values, 0, 2);
        values += stride;
    }
};

// Writes eight inputs of 16 outputs, which each have two times four bytes, to one panel or several steps of it.
template <int BITS>
void store_words(uint8_t* to, size_t step_bytes, Bytes first, Bytes second, bool is_signed);

template <int BITS, bool UNSIGNED_X>
void dot_row(Ints (&sums)[REGISTERS], const Bytes (&weights)[REGISTERS], const int8_t* word);

// Adds the products of `steps` words of rows I and a panel of weights to the sums, and advances both. Row indices are
// compile-time constants, so GCC keeps the sums in registers.
template <int BITS, bool UNSIGNED_X, size_t... I>
[[gnu::always_inline]] inline void dot_words(
    std::index_sequence<I...>, Ints (&sums)[sizeof...(I)][REGISTERS], const uint8_t*& weights, const int8_t*& x,
    size_t steps, NextTile& next) {
    for (size_t step = 0; step < steps; ++step, weights += REGISTERS * sizeof(Bytes), x += TILE_ROWS * WORD) {
        Bytes words[REGISTERS];
#pragma GCC unroll 3
        for (size_t i = 0; i < REGISTERS; ++i) words[i] = load_bytes(weights + i * sizeof(Bytes));
        (dot_row<BITS, UNSIGNED_X>(sums[I], words, x + I * WORD), ...);
        next.prefetch();
    }
}

}  // namespace fusion_edge::SIMD
