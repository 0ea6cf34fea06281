#include "quantize_activations.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd_activations.h"
#include "simd.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t MAX_BLOCK = 256;         // inputs per scale of dynamic quantization
constexpr float MIN_MAGNITUDE = 1e-30f;  // a block below it becomes 0: 127 / magnitude would overflow

// Output of the quantization of one block: inputs of a row that share a scale.
struct Block {
    int8_t* values;
    float* scale;
    int32_t* sum;
};

// Returns the activated inputs in `buffer`, or `x` itself without an activation.
const float* activate(const float* x, size_t count, Activation activation, float* buffer) {
    if (activation == Activation::NONE) return x;
    for (size_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = lane_mask(count - i);
        _mm512_mask_storeu_ps(buffer + i, mask, gelu(_mm512_maskz_loadu_ps(mask, x + i)));
    }
    return buffer;
}

// Symmetric int8 with scale = largest magnitude / 127. If an input is not finite, the scale is NaN, and so is the row's
// result.
void quantize_dynamic(const float* x, size_t count, const Weights& weights, const Block& block) {
    const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    __m512 largest = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += LANES)
        largest = max_abs(largest, _mm512_maskz_loadu_ps(lane_mask(count - i), x + i));
    float magnitude = reduce_max_abs(largest);
    if (!std::isfinite(magnitude)) {
        std::fill_n(block.values, weights.block_size, 0);
        *block.scale = std::numeric_limits<float>::quiet_NaN();
        *block.sum = 0;
        return;
    }
    if (magnitude < MIN_MAGNITUDE) magnitude = 0;
    const __m512 inverse = _mm512_set1_ps(magnitude > 0 ? 127 / magnitude : 0);
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i < weights.block_size; i += LANES) {
        const __mmask16 mask = i < count ? lane_mask(count - i) : 0;
        const __m512i quantized = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        total = _mm512_sub_epi32(total, quantized);
        __m128i bytes = _mm512_cvtsepi32_epi8(quantized);
        if (weights.bits == 4) bytes = _mm_shuffle_epi8(bytes, halves);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.values + i), bytes);
    }
    *block.scale = magnitude / 127;
    *block.sum = _mm512_reduce_add_epi32(total) * (weights.zero_points ? 1 : 1 << (weights.bits - 1));
}

// uint8 with the calibrated scale and zero point.
void quantize_static(const float* x, size_t count, const Weights& weights, const Block& block) {
    const ActivationQuantizer quantizer(*weights.static_quantization);
    for (size_t i = 0; i < count; i += LANES) {
        const __m128i quantized = quantizer.bytes(_mm512_maskz_loadu_ps(lane_mask(count - i), x + i));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.values + i), quantized);
    }
    *block.scale = weights.static_quantization->scale;
}

// Interleaves a block of a tile's rows [TILE_ROWS, MAX_BLOCK] by DOT_WIDTH inputs.
void interleave(const int8_t* rows, size_t block_size, int8_t* values) {
    for (size_t start = 0; start < block_size; start += LANES * DOT_WIDTH) {
        __m512i words[LANES];
        for (size_t i = 0; i < LANES; ++i) words[i] = _mm512_load_si512(rows + i * MAX_BLOCK + start);
        transpose(words);
        for (size_t i = 0; i < std::min(LANES, (block_size - start) / DOT_WIDTH); ++i, values += TILE_ROWS * DOT_WIDTH)
            _mm512_mask_storeu_epi32(values, lane_mask(TILE_ROWS), words[i]);
    }
}

}  // namespace

QuantizedActivations quantize_activations(
    const float* x, size_t rows, size_t tile_rows, const Weights& weights, Activation activation,
    const Parallel& parallel) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> scales;
    static thread_local Scratch<int32_t> sums;
    const size_t blocks = weights.blocks(), tiles = (rows + tile_rows - 1) / tile_rows, all = tiles * tile_rows;
    // Inputs quantized at a time: a block, or a part of the only block with static quantization.
    const size_t piece = weights.static_quantization ? MAX_BLOCK : weights.block_size;
    const size_t end = round_up(weights.inputs, piece), steps = round_up(end, 128) / DOT_WIDTH;
    const QuantizedActivations quantized{
        values.of(all * steps * DOT_WIDTH), scales.of(all * blocks), sums.of(all * blocks), steps, blocks};
    parallel(tiles, [&](size_t index) {
        const QuantizedActivations tile = quantized.tile(index, tile_rows);
        const size_t here = std::min(tile_rows, rows - index * tile_rows);
        const float* from = x + index * tile_rows * weights.inputs;
        alignas(64) int8_t buffer[LANES * MAX_BLOCK] = {};
        alignas(64) float activated[MAX_BLOCK];
        for (size_t start = 0; start < end; start += piece) {
            const size_t count = std::min(piece, weights.inputs - start);
            const size_t block_offset = weights.static_quantization ? 0 : start / piece * tile_rows;
            int8_t* to = tile.values + start * tile_rows;
            for (size_t i = 0; i < here; ++i) {
                const float* row = activate(from + i * weights.inputs + start, count, activation, activated);
                int8_t* const row_values = tile_rows == 1 ? to : buffer + i * MAX_BLOCK;
                const Block block{row_values, tile.scales + block_offset + i, tile.sums + block_offset + i};
                if (weights.static_quantization) quantize_static(row, count, weights, block);
                else quantize_dynamic(row, count, weights, block);
            }
            if (tile_rows > 1) interleave(buffer, piece, to);
        }
        std::fill(tile.values + end * tile_rows, tile.values + steps * DOT_WIDTH * tile_rows, 0);
    });
    return quantized;
}

}  // namespace fusion_edge
