#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "activation_lanes.h"
#include "lanes.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t LARGEST_BLOCK = 256;      // of dynamic rounding
constexpr float SMALLEST_EXTENT = 1e-30f;  // of inputs: what is smaller counts as 0, as 127 over it would not be finite

// What becomes of some inputs of a row that share a scale.
struct Block {
    int8_t* values;
    float* scale;
    int32_t* sum;
};

// Activated inputs, in a buffer, or the inputs themselves.
const float* activate(const float* x, size_t count, Activation activation, float* buffer) {
    if (activation == Activation::NONE) return x;
    for (size_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = first(count - i);
        _mm512_mask_storeu_ps(buffer + i, mask, gelu(_mm512_maskz_loadu_ps(mask, x + i)));
    }
    return buffer;
}

// By a scale that their largest gives. It is NaN if one of them is not finite, so that all products of the row are.
void round_block(const float* x, size_t count, const Weights& weights, const Block& block) {
    const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    __m512 largest = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += LANES)
        largest = larger_magnitude(largest, _mm512_maskz_loadu_ps(first(count - i), x + i));
    float extent = largest_magnitude(largest);
    if (!std::isfinite(extent)) {
        std::fill_n(block.values, weights.block_size, 0);
        *block.scale = std::numeric_limits<float>::quiet_NaN();
        *block.sum = 0;
        return;
    }
    if (extent < SMALLEST_EXTENT) extent = 0;
    const __m512 inverse = _mm512_set1_ps(extent > 0 ? 127 / extent : 0);
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i < weights.block_size; i += LANES) {
        const __mmask16 mask = i < count ? first(count - i) : 0;
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        total = _mm512_sub_epi32(total, rounded);
        __m128i bytes = _mm512_cvtsepi32_epi8(rounded);
        if (weights.bits == 4) bytes = _mm_shuffle_epi8(bytes, halves);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.values + i), bytes);
    }
    *block.scale = extent / 127;
    *block.sum = _mm512_reduce_add_epi32(total) * (weights.zero_points ? 1 : 1 << (weights.bits - 1));
}

// By the scale and zero point that were given.
void round_given(const float* x, size_t count, const Weights& weights, const Block& block) {
    const Rounder rounder(*weights.given);
    for (size_t i = 0; i < count; i += LANES) {
        const __m128i rounded = rounder.bytes(_mm512_maskz_loadu_ps(first(count - i), x + i));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.values + i), rounded);
    }
    *block.scale = weights.given->scale;
}

// A block of a tile's rows, LARGEST_BLOCK apart, put side by side.
void interleave(const int8_t* rows, size_t block_size, int8_t* values) {
    for (size_t start = 0; start < block_size; start += LANES * STEP) {
        __m512i words[LANES];
        for (size_t i = 0; i < LANES; ++i) words[i] = _mm512_load_si512(rows + i * LARGEST_BLOCK + start);
        transpose(words);
        for (size_t i = 0; i < std::min(LANES, (block_size - start) / STEP); ++i, values += TILE_ROWS * STEP)
            _mm512_mask_storeu_epi32(values, first(TILE_ROWS), words[i]);
    }
}

}  // namespace

Rounded round(
    const float* x, size_t rows, size_t of_tile, const Weights& weights, Activation activation,
    const Parallel& parallel) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> scales;
    static thread_local Scratch<int32_t> sums;
    const size_t blocks = weights.blocks(), tiles = (rows + of_tile - 1) / of_tile, all = tiles * of_tile;
    // A piece: what is rounded at a time. Of one block, if its scale was given, there are several.
    const size_t piece = weights.given ? LARGEST_BLOCK : weights.block_size;
    const size_t pieces = (weights.inputs + piece - 1) / piece, end = pieces * piece, steps = round_up(end, 128) / STEP;
    const Rounded rounded{values.of(all * steps * STEP), scales.of(all * blocks), sums.of(all * blocks), steps, blocks};
    parallel(tiles, [&](size_t index) {
        const Rounded tile = rounded.tile(index, of_tile);
        const size_t here = std::min(of_tile, rows - index * of_tile);
        const float* from = x + index * of_tile * weights.inputs;
        alignas(64) int8_t buffer[LANES * LARGEST_BLOCK] = {};
        alignas(64) float activated[LARGEST_BLOCK];
        for (size_t start = 0; start < end; start += piece) {
            const size_t count = std::min(piece, weights.inputs - start);
            const size_t place = weights.given ? 0 : start / piece * of_tile;
            int8_t* to = tile.values + start * of_tile;
            for (size_t i = 0; i < here; ++i) {
                const float* row = activate(from + i * weights.inputs + start, count, activation, activated);
                int8_t* const own = of_tile == 1 ? to : buffer + i * LARGEST_BLOCK;
                const Block block{own, tile.scales + place + i, tile.sums + place + i};
                if (weights.given) round_given(row, count, weights, block);
                else round_block(row, count, weights, block);
            }
            if (of_tile > 1) interleave(buffer, piece, to);
        }
        std::fill(tile.values + end * of_tile, tile.values + steps * STEP * of_tile, 0);
    });
    return rounded;
}

}  // namespace fusion_edge
