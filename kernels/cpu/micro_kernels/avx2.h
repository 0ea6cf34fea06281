// Micro-kernels of AVX2, with and without VNNI. Inline assembly: with intrinsics GCC 12 copies each accumulator.

#pragma once

#ifdef AVX_VNNI
#include "vnni.h"
#else
#include "dot_steps.h"
#endif

namespace fusion_edge::SIMD {

#ifdef AVX_VNNI

template <int BITS, bool UNSIGNED_X>
[[gnu::always_inline]] inline void dot_row(
    Ints (&sums)[REGISTERS], const Bytes (&weights)[REGISTERS], const int8_t* word) {
    const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(word));
    if constexpr (UNSIGNED_X)
        asm("%{vex%} vpdpbusd %2, %4, %0\n\t%{vex%} vpdpbusd %3, %4, %1"
            : "+&x"(sums[0].low), "+&x"(sums[0].high) : "x"(weights[0].low), "x"(weights[0].high), "x"(x));
    else
        asm("%{vex%} vpdpbusd %4, %2, %0\n\t%{vex%} vpdpbusd %4, %3, %1"
            : "+&x"(sums[0].low), "+&x"(sums[0].high) : "x"(weights[0].low), "x"(weights[0].high), "x"(x));
}

#else

// Writes bytes as int16 to two steps of a panel.
[[gnu::always_inline]] inline void store_shorts(uint8_t* to, size_t step_bytes, Bytes words, bool is_signed) {
    for (const int first : {0, 2}) {
        // Of each word; 0x80 and more make zero.
        const __m256i places = _mm256_add_epi8(
            _mm256_set1_epi32(first << 8 | (first + 1) << 24 | 0x00800080),
            _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C)));
        const auto widen = [&](__m256i half) {
            const __m256i shorts = _mm256_shuffle_epi8(half, places);  // in the high halves
            return is_signed ? _mm256_srai_epi16(shorts, 8) : _mm256_srli_epi16(shorts, 8);
        };
        store_bytes(to + first / 2 * step_bytes, {widen(words.low), widen(words.high)});
    }
}

template <int BITS>
[[gnu::always_inline]] inline void store_words(
    uint8_t* to, size_t step_bytes, Bytes first, Bytes second, bool is_signed) {
    if constexpr (BITS == 4) {
        store_bytes(to, first);
        store_bytes(to + step_bytes, second);
    } else {
        store_shorts(to, step_bytes, first, is_signed);
        store_shorts(to + 2 * step_bytes, step_bytes, second, is_signed);
    }
}

template <int BITS, bool UNSIGNED_X>
[[gnu::always_inline]] inline void dot_row(
    Ints (&sums)[REGISTERS], const Bytes (&weights)[REGISTERS], const int8_t* word) {
    const int32_t& all = *reinterpret_cast<const int32_t*>(word);
    __m256i x, product;
    if constexpr (BITS == 8)
        asm("vpbroadcastd %6, %2\n\tvpmaddwd %2, %4, %3\n\tvpaddd %3, %0, %0\n\t"
            "vpmaddwd %2, %5, %3\n\tvpaddd %3, %1, %1"
            : "+&x"(sums[0].low), "+&x"(sums[0].high), "=&x"(x), "=&x"(product)
            : "x"(weights[0].low), "x"(weights[0].high), "m"(all));
    else  // int16 sums
        asm("vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpaddw %3, %0, %0\n\t"
            "vpmaddubsw %2, %5, %3\n\tvpaddw %3, %1, %1"
            : "+&x"(sums[0].low), "+&x"(sums[0].high), "=&x"(x), "=&x"(product)
            : "x"(weights[0].low), "x"(weights[0].high), "m"(all));
}

// With 4 bits, sums int16 over some steps before it adds them to int32.
template <int BITS, bool UNSIGNED_X, size_t... I>
[[gnu::always_inline]] inline void dot_steps(
    std::index_sequence<I...> rows, Ints (&sums)[sizeof...(I)][REGISTERS], const uint8_t*& weights, const int8_t*& x,
    size_t steps, NextTile& next) {
    if constexpr (BITS == 8) return dot_words<BITS, UNSIGNED_X>(rows, sums, weights, x, steps, next);
    constexpr size_t STEPS = 8;  // each adds up to 2 * 15 * 127 to a sum
    static_assert(STEPS * 2 * 15 * 127 <= 32767);
    for (size_t step = 0; step < steps; step += STEPS) {
        Ints shorts[sizeof...(I)][REGISTERS] = {(void(I), zero_bytes())...};
        dot_words<BITS, UNSIGNED_X>(rows, shorts, weights, x, std::min(STEPS, steps - step), next);
        const __m256i ones = _mm256_set1_epi16(1);
        ((sums[I][0] = {add_products(sums[I][0].low, shorts[I][0].low, ones),
                        add_products(sums[I][0].high, shorts[I][0].high, ones)}), ...);
    }
}

#endif

// totals += float(sums) * scales * x_scale.
[[gnu::always_inline]] inline void add_scaled(Ints sums, Floats scales, const float* x_scale, float* totals) {
    store(totals, fma(to_floats(sums), mul(scales, broadcast(*x_scale)), load(totals)));
}

// sums += word * lanes, for a float32 of a row that is broadcast.
template <bool BFLOAT16>
[[gnu::always_inline]] inline void multiply_add_row(
    Floats* sums, const Floats* lanes, size_t registers, const uint32_t* word) {
    const __m256 x = _mm256_broadcast_ss(reinterpret_cast<const float*>(word));
#pragma GCC unroll 3
    for (size_t i = 0; i < registers; ++i)
        asm("vfmadd231ps %2, %4, %0\n\tvfmadd231ps %3, %4, %1"
            : "+&x"(sums[i].low), "+&x"(sums[i].high) : "x"(lanes[i].low), "x"(lanes[i].high), "x"(x));
}

}  // namespace fusion_edge::SIMD
