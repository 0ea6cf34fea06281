// Quantization of activations to 8 bits, in the layout that GEMV and GEMM read.

#pragma once

#include <cmath>
#include <limits>

#include "functions.h"

namespace fusion_edge::SIMD {

constexpr size_t MAX_BLOCK = 256;       // inputs per scale of dynamic quantization
constexpr float MIN_MAGNITUDE = 1e-30f;  // a block below it becomes 0: 127 / magnitude would overflow

// Number of inputs in a word of a tile of rows. Rows of GEMV (tiles of one row) have bytes.
inline size_t word_inputs(const Weights& weights, size_t tile_rows) {
    return tile_rows == 1 ? WORD : weights.bits == 4 ? DOT_WIDTH<4> : DOT_WIDTH<8>;
}

// Number of words of a block.
inline size_t count_words(size_t inputs, size_t width) { return (inputs + width - 1) / width; }

// Offset of unsigned bytes: of weights of 8 bits, or with static quantization of activations.
inline int32_t unsigned_offset(const Weights& weights) { return weights.bits == 8 ? UNSIGNED_OFFSET : 0; }

// Quantized rows in tiles. A tile interleaves the words of its rows, so a GEMM reads one stream. With 4-bit weights, of
// every 8 inputs those at even positions precede those at odd ones, as in the halves of weight bytes.
struct QuantizedActivations {
    // [tiles, steps, rows of a tile, WORD]. Dynamic: signed, zero after the last input. Static: unsigned minus
    // UNSIGNED_OFFSET, undefined after the last input, where weights are zero.
    int8_t* values;
    float* scales;  // [tiles, blocks, rows of a tile]
    // [tiles, blocks, rows of a tile]: minus the sum of a block's values, times the zero point of the weights if it is
    // the same for all. Undefined with static quantization.
    int32_t* sums;
    size_t steps, blocks;  // steps: words of a row

    // Returns tile `index` of tiles with `rows` rows.
    QuantizedActivations tile(size_t index, size_t rows) const {
        return {
            values + index * steps * rows * WORD, scales + index * blocks * rows, sums + index * blocks * rows,
            steps, blocks};
    }
};

// Static quantization, with the results of ONNX's QuantizeLinear.
class ActivationQuantizer {
  public:
    [[gnu::always_inline]] explicit ActivationQuantizer(const ActivationQuantization& quantization)
        : scale_(broadcast(quantization.scale)),
          inverse_(broadcast(1 / quantization.scale)),
          extent_(broadcast(256 * quantization.scale)),
          zero_point_(broadcast_int(quantization.zero_point - UNSIGNED_OFFSET)) {}

    // Before the clamp to 0 ... 255 less UNSIGNED_OFFSET, which values exceed by less than 512.
    [[gnu::always_inline]] Ints integers(Floats x) const {
        const Floats near = min(max(x, sub(broadcast(0), extent_)), extent_);
        // Correctly rounded quotient x / scale without a division, which costs as much as ten other instructions: the
        // residual corrects the product with the inverse (https://doi.org/10.1147/rd.341.0111).
        const Floats quotient = mul(near, inverse_);
        const Floats exact = fma(fnma(quotient, scale_, near), inverse_, quotient);
        return add_ints(to_ints(exact), zero_point_);
    }

    // Writes 16 values.
    [[gnu::always_inline]] void store(int8_t* to, Floats x) const {
        if constexpr (UNSIGNED_OFFSET > 0) store_int8(to, integers(x));
        else store_uint8(reinterpret_cast<uint8_t*>(to), integers(x));
    }

  private:
    Floats scale_, inverse_, extent_;
    Ints zero_point_;
};

// A block of inputs of a row that share a scale, after dynamic quantization.
struct QuantizedBlock {
    float scale;
    int32_t sum;  // of the values
};

// Returns the activated inputs in `buffer`, or `x` itself without an activation.
inline const float* activate(const float* x, size_t count, Activation activation, float* buffer) {
    if (activation == Activation::NONE) return x;
    for (size_t i = 0; i < count; i += LANES) store(buffer + i, gelu(load(x + i, count - i)), count - i);
    return buffer;
}

// Writes `size` values, of which the first `count` inputs exist and the others are zero: symmetric int8 with scale =
// largest magnitude / 127. If an input is not finite, the scale is NaN, and so is the row's result.
inline QuantizedBlock quantize_dynamic(const float* x, size_t count, size_t size, int8_t* values) {
    Floats largest = broadcast(0);
    for (size_t i = 0; i < count; i += LANES) largest = max_abs(largest, load(x + i, count - i));
    float magnitude = reduce_max_abs(largest);
    if (!std::isfinite(magnitude)) {
        std::fill_n(values, size, int8_t(0));
        return {std::numeric_limits<float>::quiet_NaN(), 0};
    }
    if (magnitude < MIN_MAGNITUDE) magnitude = 0;
    const Floats inverse = broadcast(magnitude > 0 ? 127 / magnitude : 0);
    Ints total = broadcast_int(0);
    for (size_t i = 0; i < size; i += LANES) {
        const Ints quantized = to_ints(mul(i < count ? load(x + i, count - i) : broadcast(0), inverse));
        total = add_ints(total, quantized);
        store_int8(values + i, quantized);
    }
    return {magnitude / 127, reduce_add_ints(total)};
}

// 8 bits with the calibrated scale and zero point.
inline void quantize_static(const float* x, size_t count, const ActivationQuantization& quantization, int8_t* values) {
    const ActivationQuantizer quantizer(quantization);
    for (size_t i = 0; i < count; i += LANES) quantizer.store(values + i, load(x + i, count - i));
}

// Moves the inputs at even positions of every 8 before those at odd ones. `count` is a multiple of 16.
inline void separate_even(int8_t* values, size_t count) {
    typedef int8_t Bytes16 __attribute__((vector_size(16)));
    for (size_t i = 0; i < count; i += 16) {
        Bytes16 bytes;
        std::memcpy(&bytes, values + i, 16);
        bytes = __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        std::memcpy(values + i, &bytes, 16);
    }
}

// Interleaves the words of a block of a tile's rows, which are `row_lanes` lanes apart and have `count` each.
inline void interleave(const int32_t* rows, size_t row_lanes, size_t count, int8_t* values) {
    if (WORD > LANE_BYTES) {
        for (size_t start = 0; start < count; start += WORD / LANE_BYTES)
            for (size_t i = 0; i < TILE_ROWS; ++i, values += WORD)
                std::memcpy(values, rows + i * row_lanes + start, WORD);
        return;
    }
    for (size_t start = 0; start < count; start += LANES) {
        Ints columns[LANES];
        for (size_t i = 0; i < LANES; ++i) columns[i] = load_ints(rows + i * row_lanes + start);
        transpose(columns);
        for (size_t i = 0; i < std::min(LANES, count - start); ++i, values += TILE_ROWS * WORD)
            store_ints(reinterpret_cast<int32_t*>(values), columns[i], TILE_ROWS);
    }
}

// Rows of a block before they are interleaved.
struct alignas(64) RowBuffer {
    int8_t bytes[LANES * MAX_BLOCK];
    int16_t shorts[LANES * MAX_BLOCK];

    void write(const Weights& weights, size_t count, int8_t* to) {
        if (word_inputs(weights, TILE_ROWS) == WORD)
            return interleave(reinterpret_cast<const int32_t*>(bytes), MAX_BLOCK / LANE_BYTES, count / LANE_BYTES, to);
        for (size_t i = 0; i < TILE_ROWS * MAX_BLOCK; ++i)
            shorts[i] = weights.static_quantization ? int16_t(uint8_t(bytes[i])) : int16_t(bytes[i]);
        interleave(reinterpret_cast<const int32_t*>(shorts), MAX_BLOCK / 2, count / 2, to);
    }
};

// Quantizes x [rows, inputs] into tiles of `tile_rows` rows (1 or TILE_ROWS), in memory that the calling thread keeps.
// Missing rows of the last tile are undefined.
inline QuantizedActivations quantize_activations(
    const float* x, size_t rows, size_t tile_rows, const Weights& weights, Activation activation,
    const Parallel& parallel) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> scales;
    static thread_local Scratch<int32_t> sums;
    const size_t blocks = weights.blocks(), tiles = (rows + tile_rows - 1) / tile_rows, all = tiles * tile_rows;
    // Inputs quantized at a time: a block, or a part of the only block with static quantization.
    const size_t piece = weights.static_quantization ? MAX_BLOCK : weights.block_size;
    // Of weights that share one, which the sums include.
    const int32_t zero_point = weights.zero_points ? 1 : (1 << (weights.bits - 1)) - unsigned_offset(weights);
    const size_t width = word_inputs(weights, tile_rows);
    const size_t end = round_up(weights.inputs, piece), steps = round_up(end, 128) / width;
    const QuantizedActivations quantized{
        values.of(all * steps * WORD), scales.of(all * blocks), sums.of(all * blocks), steps, blocks};
    parallel(tiles, [&](size_t index) {
        const QuantizedActivations tile = quantized.tile(index, tile_rows);
        const size_t here = std::min(tile_rows, rows - index * tile_rows);
        const float* from = x + index * tile_rows * weights.inputs;
        static thread_local RowBuffer buffer;
        alignas(64) float activated[MAX_BLOCK];
        for (size_t start = 0; start < end; start += piece) {
            const size_t count = std::min(piece, weights.inputs - start);
            int8_t* to = tile.values + start / width * WORD * tile_rows;
            for (size_t i = 0; i < here; ++i) {
                const float* row = activate(from + i * weights.inputs + start, count, activation, activated);
                int8_t* const row_values = tile_rows == 1 ? to : buffer.bytes + i * MAX_BLOCK;
                if (weights.static_quantization) {
                    quantize_static(row, count, *weights.static_quantization, row_values);
                    tile.scales[i] = weights.static_quantization->scale;
                } else {
                    const QuantizedBlock block = quantize_dynamic(row, count, piece, row_values);
                    tile.scales[start / piece * tile_rows + i] = block.scale;
                    tile.sums[start / piece * tile_rows + i] = -block.sum * zero_point;
                }
                if (weights.bits == 4) separate_even(row_values, piece);
            }
            if (tile_rows > 1) buffer.write(weights, piece, to);
        }
        const size_t step = end / width;
        std::fill_n(tile.values + step * WORD * tile_rows, (steps - step) * WORD * tile_rows, int8_t(0));
    });
    return quantized;
}

}  // namespace fusion_edge::SIMD
