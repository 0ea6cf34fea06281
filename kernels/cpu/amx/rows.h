// Activations as AMX's right factor, and how inputs of a linear layer are divided for AMX.

#pragma once

#include "../generic/gemv.h"
#include "tiles.h"

namespace fusion_edge::SIMD::amx_gemm {

constexpr size_t SUPERBLOCK = 256;          // inputs of 4-bit weights that share a scale, at least
constexpr size_t INTEGER_SUPERBLOCK = 512;  // inputs that one int32 sum of tiles adds with static quantization

// Division of a layer's inputs into steps, one product of tiles each, and of steps into superblocks.
struct AmxSteps {
    size_t depth;       // inputs of a step
    size_t superblock;  // inputs with one scale of weights and activations
    size_t width;       // all inputs, padded to whole chunks of weights

    explicit AmxSteps(const Weights& weights)
        : superblock(
              weights.static_quantization ? INTEGER_SUPERBLOCK
              : weights.bits == 8         ? weights.block_size
                                          : std::max(weights.block_size, SUPERBLOCK)),
          width(round_up(weights.row_bytes(), CHUNK) * 8 / weights.bits) {
        depth = std::min(superblock, AMX_BYTES);
    }
    size_t superblocks() const { return (width + superblock - 1) / superblock; }
};

// Quantized activations in tiles of 16 rows. Missing rows are undefined, but have scales of 0.
struct AmxRows {
    // [tiles, width / 4, 16, 4], zero after the last input; undefined with static quantization, where weights are zero.
    // Of 4-bit weights' chunks, even inputs first.
    uint8_t* values;
    float* scales;    // [tiles, superblocks, 16]; undefined with static quantization
    float* sums;      // [tiles, superblocks, 16]: sums of the values, as scales
    size_t width, superblocks;

    uint8_t* tile(size_t index) const { return values + index * width * AMX_ROWS; }
};

constexpr size_t MAX_PIECE = 512;        // inputs quantized at a time

// Low bytes of the words of two registers.
[[gnu::always_inline]] inline __m512i low_bytes(__m512i first, __m512i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)), _mm512_cvtepi16_epi8(second), 1);
}

// Interleaves bytes [16, MAX_PIECE] of `count` inputs by four; with `splits`, of each 128 the even ones first.
inline void interleave(int8_t* bytes, size_t count, bool splits, uint8_t* to) {
    if (splits)
        for (size_t row = 0; row < AMX_ROWS; ++row)
            for (size_t i = 0; i < count; i += 2 * AMX_BYTES) {
                int8_t* pair = bytes + row * MAX_PIECE + i;
                const __m512i first = _mm512_load_si512(pair), second = _mm512_load_si512(pair + AMX_BYTES);
                _mm512_store_si512(pair, low_bytes(first, second));
                _mm512_store_si512(
                    pair + AMX_BYTES, low_bytes(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
            }
    for (size_t start = 0; start < count; start += AMX_BYTES) {
        __m512i words[LANES];
        for (size_t row = 0; row < AMX_ROWS; ++row) words[row] = _mm512_load_si512(bytes + row * MAX_PIECE + start);
        transpose(words);
        for (size_t i = 0; i < std::min(LANES, (count - start) / 4); ++i, to += AMX_BYTES)
            _mm512_store_si512(to, words[i]);
    }
}

// Memory of rows that are written later.
inline AmxRows allocate_amx_rows(Scratch<uint8_t>& memory, size_t rows, size_t width) {
    return {memory.of(round_up(rows, AMX_ROWS) * width), nullptr, nullptr, width, 0};
}

// Quantizes x [rows, inputs], in memory that the calling thread keeps.
inline AmxRows pack_amx_rows(
    const float* x, size_t rows, const Weights& weights, Activation activation, const Parallel& parallel) {
    static thread_local Scratch<uint8_t> memory;
    static thread_local Scratch<float> scales, sums;
    const AmxSteps steps(weights);
    const size_t tiles = (rows + AMX_ROWS - 1) / AMX_ROWS, blocks = steps.superblocks();
    AmxRows packed = allocate_amx_rows(memory, rows, steps.width);
    packed.superblocks = blocks;
    packed.scales = scales.of(tiles * blocks * AMX_ROWS);
    packed.sums = sums.of(tiles * blocks * AMX_ROWS);
    parallel(tiles * blocks, [&](size_t index) {
        const size_t tile = index / blocks, start = index % blocks * steps.superblock;
        const size_t count = std::min(steps.superblock, steps.width - start);
        const size_t valid = start < weights.inputs ? std::min(count, weights.inputs - start) : 0;
        alignas(64) int8_t bytes[AMX_ROWS * MAX_PIECE];
        alignas(64) float activated[MAX_PIECE];
        for (size_t i = 0; i < AMX_ROWS; ++i) {
            float& scale = packed.scales[index * AMX_ROWS + i];
            float& sum = packed.sums[index * AMX_ROWS + i];
            scale = sum = 0;
            const size_t row = tile * AMX_ROWS + i;
            if (row >= rows) continue;
            const float* from = activate(x + row * weights.inputs + start, valid, activation, activated);
            int8_t* const to = bytes + i * MAX_PIECE;
            if (weights.static_quantization) {
                quantize_static(from, valid, *weights.static_quantization, to);
            } else {
                const QuantizedBlock block = quantize_dynamic(from, valid, count, to);
                scale = block.scale;
                sum = float(block.sum);
            }
        }
        interleave(bytes, count, weights.bits == 4, packed.tile(tile) + start * AMX_ROWS);
    });
    return packed;
}

}  // namespace fusion_edge::SIMD::amx_gemm
