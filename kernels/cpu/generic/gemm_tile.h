// Micro-kernel of GEMM: TILE_ROWS rows of activations times a panel of REGISTERS * 16 outputs.
//
// A panel interleaves the words of its outputs. Each broadcast of a row's word serves all registers of outputs.

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "gemm_driver.h"
#include "quantize_activations.h"

namespace fusion_edge::SIMD {

constexpr size_t CHUNK = sizeof(Bytes);        // bytes of weights
constexpr size_t PANEL = REGISTERS * LANES;    // outputs of a tile

// The operand with a zero point, which is unsigned; the other is signed. Activations have one with static quantization;
// weights have one for all, or one per block.
enum class ZeroPoint { OF_ACTIVATIONS, OF_WEIGHTS, OF_BLOCKS };

// Packed weights of PANEL outputs.
struct Panel {
    const uint8_t* values;  // [steps, PANEL, WORD]; inputs in the order of QuantizedActivations
    const float* scales;    // [blocks, PANEL]
    // [blocks, PANEL]: zero points of weights (undefined if all are the same); or, with static quantization, minus the
    // zero point of activations times the sum of the weights. Both less the offset of unsigned bytes.
    const int32_t* zero_points;
    const float* bias;      // [PANEL]
};

// Memory of one packed panel.
struct PanelScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zero_points;
    alignas(64) float bias[PANEL];
};

// Packs the values of `count` outputs and, with static quantization, sums the values of each.
template <int BITS>
void pack_values(const Weights& weights, size_t output, size_t count, uint8_t* to, int32_t* sums) {
    constexpr size_t STEP = WORD * PANEL, EIGHT_INPUTS = 8 / DOT_WIDTH<BITS> * STEP;  // bytes
    const size_t bytes = weights.row_bytes();
    const bool is_signed = weights.static_quantization;
    const Bytes ones = broadcast_byte(1);
    Ints totals[PANEL];
    std::fill_n(totals, PANEL, broadcast_int(0));
    // Prefetch in memory order: the loop below reads the rows in turns, which is slow from memory.
    const uint8_t* const all = weights.values + output * bytes;
    for (size_t start = 0; start < count * bytes; start += CHUNK) __builtin_prefetch(all + start, 0, 2);
    for (size_t start = 0; start < bytes; start += CHUNK)
        for (size_t side = 0; side < REGISTERS; ++side) {
            Bytes rows[LANES];
            for (size_t i = 0; i < LANES; ++i) {
                const size_t one = side * LANES + i;
                const uint8_t* from = weights.values + (output + one) * bytes + start;
                rows[i] = one < count ? load_bytes(from, bytes - start) : zero_bytes();
                if (is_signed) totals[one] = dot<8>(totals[one], ones, rows[i]);
            }
            transpose(rows);
            uint8_t* eight = to + start / BITS * EIGHT_INPUTS + side * CHUNK;
            for (size_t i = 0; i < LANES; i += BITS / 4, eight += EIGHT_INPUTS)
                if constexpr (BITS == 8) store_words<8>(eight, STEP, rows[i], rows[i + 1], is_signed);
                else store_words<4>(eight, STEP, low_halves(rows[i]), high_halves(rows[i]), false);
        }
    for (size_t i = 0; is_signed && i < PANEL; ++i) sums[i] = reduce_add_ints(totals[i]);
}

// 16 scales from `index` on, of which `count` exist; the others are zero.
[[gnu::always_inline]] inline Floats load_scales(const Weights& weights, size_t index, size_t count) {
    if (!weights.half_scales) return load(static_cast<const float*>(weights.scales) + index, count);
    return load_half(static_cast<const uint16_t*>(weights.scales) + index, count);
}

// 16 zero points of an output from `block` on, as far as they exist.
inline Floats load_zero_points(const Weights& weights, size_t output, size_t block) {
    const size_t count = std::min(LANES, weights.blocks() - block);
    if (weights.bits == 8) return load(weights.zero_points + output * weights.zero_point_bytes() + block, count);
    uint8_t points[LANES];
    for (size_t i = 0; i < count; ++i) points[i] = weights.zero_point(output, block + i);
    return load(points, count);
}

// Packs the scales [blocks, PANEL] of `count` outputs.
inline void pack_scales(const Weights& weights, size_t output, size_t count, float* packed) {
    const size_t blocks = weights.blocks();
    for (size_t block = 0; block < blocks; block += LANES)
        for (size_t side = 0; side < REGISTERS; ++side) {
            Ints rows[LANES];
            for (size_t i = 0; i < LANES; ++i) {
                const size_t one = side * LANES + i;
                const Floats scales =
                    one < count ? load_scales(weights, (output + one) * blocks + block, blocks - block) : broadcast(0);
                rows[i] = as_ints(scales);
            }
            transpose(rows);
            for (size_t i = 0; i < LANES; ++i)
                store(packed + (block + i) * PANEL + side * LANES, as_floats(rows[i]));
        }
}

// Packs the panel of outputs from `output` on.
inline Panel pack(const Weights& weights, size_t output, PanelScratch& scratch) {
    const size_t blocks = weights.blocks(), count = std::min(PANEL, weights.outputs - output);
    const size_t words = round_up(weights.row_bytes(), CHUNK) * (8 / weights.bits) / word_inputs(weights, TILE_ROWS);
    uint8_t* to = scratch.values.of(words * WORD * PANEL);
    int32_t sums[PANEL];
    if (weights.bits == 4) pack_values<4>(weights, output, count, to, sums);
    else pack_values<8>(weights, output, count, to, sums);
    float* scales = scratch.scales.of(round_up(blocks, LANES) * PANEL);
    pack_scales(weights, output, count, scales);
    int32_t* zero = scratch.zero_points.of(blocks * PANEL);
    for (size_t i = 0; weights.zero_points && i < count; ++i)
        for (size_t block = 0; block < blocks; ++block)
            zero[block * PANEL + i] = weights.zero_point(output + i, block) - unsigned_offset(weights);
    for (size_t i = 0; i < PANEL; i += LANES) {
        const bool has_bias = weights.bias && i < count;
        store(scratch.bias + i, has_bias ? load(weights.bias + output + i, count - i) : broadcast(0));
    }
    for (size_t i = 0; weights.static_quantization && i < PANEL; ++i)
        zero[i] = (UNSIGNED_OFFSET - weights.static_quantization->zero_point) * sums[i];
    return {to, scales, zero, scratch.bias};
}

// Row indices I are compile-time constants, so GCC keeps the accumulators in registers.
template <ZeroPoint ZERO, int BITS, size_t... I>
void matmul_rows(
    std::index_sequence<I...> rows, const Panel& panel, const QuantizedActivations& tile, size_t block_size,
    NextTile next, float* result) {
    constexpr size_t ROWS = sizeof...(I);
    const uint8_t* weight = panel.values;
    const int8_t* x = tile.values;
    const float* x_scales = tile.scales;
    const int32_t* x_sums = tile.sums;
    for (size_t i = 0; i < ROWS * PANEL; i += LANES) store(result + i, broadcast(0));
    for (size_t block = 0; block < tile.blocks; ++block, x_scales += TILE_ROWS, x_sums += TILE_ROWS) {
        Ints sums[ROWS][REGISTERS];
        const int32_t* zero = panel.zero_points + block * PANEL;
#pragma GCC unroll 3
        for (size_t i = 0; i < REGISTERS; ++i) {
            if constexpr (ZERO == ZeroPoint::OF_ACTIVATIONS) {
                ((sums[I][i] = load_ints(zero + i * LANES)), ...);  // there is one block
            } else if constexpr (ZERO == ZeroPoint::OF_WEIGHTS) {
                ((sums[I][i] = broadcast_int(x_sums[I])), ...);
            } else {
                const Ints zeros = load_ints(zero + i * LANES);
                ((sums[I][i] = mul_ints(broadcast_int(x_sums[I]), zeros)), ...);
            }
        }
        constexpr bool UNSIGNED_X = ZERO == ZeroPoint::OF_ACTIVATIONS;
        dot_steps<BITS, UNSIGNED_X>(rows, sums, weight, x, count_words(block_size, DOT_WIDTH<BITS>), next);
        float* totals = result;
        asm("" : "+r"(totals));  // one base address for all stores
#pragma GCC unroll 3
        for (size_t i = 0; i < REGISTERS; ++i) {
            const Floats scales = load(panel.scales + block * PANEL + i * LANES);
            (add_scaled(sums[I][i], scales, x_scales + I, totals + I * PANEL + i * LANES), ...);
        }
    }
}

using MatmulTile = void (*)(const Panel&, const QuantizedActivations&, size_t, NextTile, float*);

template <ZeroPoint ZERO, int BITS, size_t ROWS>
void matmul_tile(
    const Panel& panel, const QuantizedActivations& tile, size_t block_size, NextTile next, float* result) {
    matmul_rows<ZERO, BITS>(std::make_index_sequence<ROWS>(), panel, tile, block_size, next, result);
}

// Index: number of rows - 1.
using MatmulTiles = std::array<MatmulTile, TILE_ROWS>;

template <ZeroPoint ZERO, int BITS, size_t... I>
constexpr MatmulTiles matmul_tiles(std::index_sequence<I...>) {
    return {matmul_tile<ZERO, BITS, I + 1>...};
}

inline const MatmulTiles& matmul_tiles(const Weights& weights) {
    constexpr auto ROWS = std::make_index_sequence<TILE_ROWS>();
    static constexpr MatmulTiles ACTIVATIONS = matmul_tiles<ZeroPoint::OF_ACTIVATIONS, 8>(ROWS);
    static constexpr MatmulTiles ALL_WEIGHTS[] = {
        matmul_tiles<ZeroPoint::OF_WEIGHTS, 4>(ROWS), matmul_tiles<ZeroPoint::OF_WEIGHTS, 8>(ROWS)};
    static constexpr MatmulTiles BLOCKS[] = {
        matmul_tiles<ZeroPoint::OF_BLOCKS, 4>(ROWS), matmul_tiles<ZeroPoint::OF_BLOCKS, 8>(ROWS)};
    if (weights.static_quantization) return ACTIVATIONS;
    return (weights.zero_points ? BLOCKS : ALL_WEIGHTS)[weights.bits == 8];
}

// Writes GELU of the results, quantized, as the next layer's activations.
class GeluWriter final : public TileWriter {
  public:
    // Missing rows of the last tile are undefined.
    GeluWriter(size_t rows, const Weights& weights, const ActivationQuantization& quantization)
        : quantizer_(quantization) {
        static thread_local Scratch<int8_t> values;
        static thread_local Scratch<float> scales;
        static thread_local Scratch<int32_t> sums;
        const size_t all = round_up(rows, TILE_ROWS), steps = round_up(weights.outputs, PANEL) / DOT_WIDTH<8>;
        hidden = {values.of(all * steps * WORD), scales.of(all), sums.of(all), steps, 1};
        std::fill(hidden.scales, hidden.scales + all, quantization.scale);
    }

    void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const override {
        int8_t* to = place(row, output);
        for (size_t i = 0; i < rows; ++i, to += WORD)
            for (size_t j = 0; j < PANEL; j += LANES) {
                alignas(16) int8_t bytes[LANES];
                quantizer_.store(bytes, gelu(add(load(sums + i * PANEL + j), load(bias + j))));
                write_words(bytes, to + j / DOT_WIDTH<8> * TILE_ROWS * WORD);
            }
    }

    void prefetch(size_t row, size_t, size_t output) const override {
        const int8_t* to = place(row, output);
        for (size_t i = 0; i < PANEL / DOT_WIDTH<8> * TILE_ROWS * WORD; i += 64) __builtin_prefetch(to + i, 1);
    }

    QuantizedActivations hidden;

  private:
    int8_t* place(size_t row, size_t output) const {
        return hidden.tile(row / TILE_ROWS, TILE_ROWS).values + output / DOT_WIDTH<8> * TILE_ROWS * WORD;
    }

    // Writes 16 bytes of a row as words, in steps of a tile.
    static void write_words(const int8_t* bytes, int8_t* to) {
        int16_t shorts[LANES];
        const void* from = bytes;
        if constexpr (DOT_WIDTH<8> == 2) {
            for (size_t i = 0; i < LANES; ++i) shorts[i] = uint8_t(bytes[i]);
            from = shorts;
        }
        for (size_t i = 0; i < LANES / DOT_WIDTH<8>; ++i)
            std::memcpy(to + i * TILE_ROWS * WORD, static_cast<const int8_t*>(from) + i * WORD, WORD);
    }

    ActivationQuantizer quantizer_;
};

class TileKernel {
  public:
    static constexpr size_t ROWS = TILE_ROWS, OUTPUTS = PANEL, BLOCK_ROWS = ROWS;
    using Inputs = QuantizedActivations;
    using ResultWriter = FloatWriter<OUTPUTS>;
    using HiddenWriter = GeluWriter;

    static Inputs pack_rows(
        const float* x, size_t rows, const Weights& weights, Activation activation, const Parallel& parallel) {
        return quantize_activations(x, rows, ROWS, weights, activation, parallel);
    }
    static size_t cached_panels(const Inputs& x) {
        return l2_cache() / 2 / (x.steps * WORD * OUTPUTS);
    }

    TileKernel(const Inputs& x, size_t rows, const Weights& weights, size_t output, size_t panels)
        : x_(x),
          rows_(rows),
          count_(panels),
          block_size_(weights.block_size),
          steps_(weights.blocks() * count_words(weights.block_size, word_inputs(weights, ROWS))),
          matmul_(matmul_tiles(weights)) {
        static thread_local std::array<PanelScratch, MAX_PANELS> scratch;
        for (size_t i = 0; i < panels; ++i) panels_[i] = pack(weights, output + i * OUTPUTS, scratch[i]);
    }

    const float* bias(size_t panel) const { return panels_[panel].bias; }

    template <class Output>
    void multiply(size_t row, size_t rows, const Output& output) const {
        const QuantizedActivations tile = x_.tile(row / ROWS, ROWS);
        const size_t size = row + ROWS < rows_ ? tile.steps * WORD * ROWS : 0;
        NextTile next{tile.values + size, size ? (WORD * ROWS + count_ - 1) / count_ : 0};
        alignas(64) float sums[ROWS * OUTPUTS] = {};
        for (size_t i = 0; i < count_; ++i) {
            output.prefetch(i, row, rows);
            matmul_[rows - 1](panels_[i], tile, block_size_, next, sums);
            next.values += steps_ * next.stride;
            output.write(sums, i, row, rows);
        }
    }

  private:
    Inputs x_;
    size_t rows_, count_, block_size_, steps_;
    std::array<Panel, MAX_PANELS> panels_;
    const MatmulTiles& matmul_;
};

// GEMMs of more than FEW_ROWS rows (gemv.h).
struct TileGemm {
    static constexpr auto gemm = gemm_rows<TileKernel>;
    static constexpr auto mlp = mlp_rows<TileKernel>;
};

}  // namespace fusion_edge::SIMD
