// GEMV: one row of activations, or few. Bound by memory bandwidth: weights are read once, in place, in chunks of 64
// bytes.

#pragma once

#include <algorithm>

#include "gemm_tile.h"

namespace fusion_edge::SIMD {

// A row of quantized activations, in the order of the weights.
struct Row {
    const int8_t* values;      // [chunks, 64] or, for 4 bits, [chunks, 2, 64]: inputs of low, then of high halves
    const float* scales;       // [blocks]
    const float* corrections;  // [blocks]: scale * sum, from which the zero points are corrected
};

constexpr size_t FEW_ROWS = 4;  // that GEMV is faster with than GEMM, which unpacks weights to memory

// Rows of quantized activations for GEMV.
class GemvRows {
  public:
    GemvRows(const QuantizedActivations& x, size_t rows, const Weights& weights) : x_(x), bits_(weights.bits) {
        if (weights.static_quantization) return;
        static thread_local Scratch<int8_t> values;
        static thread_local Scratch<float> corrections;
        corrections_ = corrections.of(rows * x.blocks);
        for (size_t i = 0; i < rows * x.blocks; ++i) corrections_[i] = x.scales[i] * float(x.sums[i]);
        if (weights.bits == 8) return;
        values_ = values.of(rows * row_bytes());
        for (size_t row = 0; row < rows; ++row) separate_halves(x.tile(row, 1).values, values_ + row * row_bytes());
    }

    Row operator[](size_t row) const {
        const QuantizedActivations one = x_.tile(row, 1);
        const int8_t* values = bits_ == 8 ? one.values : values_ + row * row_bytes();
        return {values, one.scales, corrections_ + row * x_.blocks};
    }

  private:
    size_t row_bytes() const { return round_up(x_.steps * WORD, 2 * CHUNK); }

    // Reorders 4-bit inputs.
    void separate_halves(const int8_t* from, int8_t* to) const {
        for (size_t i = 0; i < x_.steps * WORD; i += 2 * CHUNK)
            for (size_t lane = 0; lane < CHUNK; lane += LANE_BYTES) {
                std::memcpy(to + i + lane, from + i + 2 * lane, LANE_BYTES);
                std::memcpy(to + i + CHUNK + lane, from + i + 2 * lane + LANE_BYTES, LANE_BYTES);
            }
    }

    QuantizedActivations x_;
    int bits_;
    float* corrections_ = nullptr;
    int8_t* values_ = nullptr;
};

// Zero points of up to 16 blocks of an output; 1 if all blocks have the same one, which the sums already include.
inline Floats zero_points(const Weights& weights, size_t output, size_t block) {
    if (!weights.zero_points) return broadcast(1);
    return sub(load_zero_points(weights, output, block), broadcast(float(unsigned_offset(weights))));
}

// A chunk of weights, unpacked: 4-bit ones to low and high halves.
template <int BITS>
struct Unpacked {
    Bytes parts[8 / BITS];

    [[gnu::always_inline]] explicit Unpacked(Bytes weights) {
        if constexpr (BITS == 8) {
            parts[0] = less_offset(weights);
        } else {
            parts[0] = low_halves(weights);
            parts[1] = high_halves(weights);
        }
    }

    // sums + dot products with inputs of a row.
    [[gnu::always_inline]] Ints dot(Ints sums, const int8_t* x) const {
        sums = SIMD::dot<BITS>(sums, parts[0], load_bytes(x));
        if constexpr (BITS == 4) sums = SIMD::dot<4>(sums, parts[1], load_bytes(x + CHUNK));
        return sums;
    }
};

// Number of outputs read in turns, each a separate stream in memory. Measured: on Zen 4, one stream is fastest (two
// take twice as long, and software prefetch costs 10 %). On Ice Lake, four streams are 1.25 times as fast as one, and
// 1.45 times with software prefetch.
constexpr size_t MAX_STREAMS = 4;
constexpr size_t PREFETCH_DISTANCE = 1024;  // bytes

// Prefetches ahead in a stream, if there are several.
template <size_t STREAMS>
[[gnu::always_inline]] inline void prefetch(const uint8_t* values) {
    if constexpr (STREAMS > 1) __builtin_prefetch(values + PREFETCH_DISTANCE);
}

// Writes the factor of each block's integer sum. Returns the correction for the zero points, not summed over lanes.
inline Floats scale_blocks(const Row& row, const Weights& weights, size_t output, float* factors) {
    const size_t blocks = weights.blocks();
    Floats total = broadcast(0);
    for (size_t block = 0; block < blocks; block += LANES) {
        const size_t count = blocks - block;
        const Floats scale = load_scales(weights, output * blocks + block, count);
        store(factors + block, mul(scale, load(row.scales + block, count)));
        const Floats correction = mul(scale, load(row.corrections + block, count));
        total = fma(correction, zero_points(weights, output, block), total);
    }
    return total;
}

// Rows that share unpacked weights, and their results.
template <size_t ROWS>
struct RowGroup {
    Row rows[ROWS];
    float* results[ROWS];
};

// Computes STREAMS * count outputs of the rows in streams of `count` outputs each. A block has CHUNKS chunks; with 0, a
// chunk has several blocks.
template <int BITS, int CHUNKS, size_t STREAMS, size_t ROWS>
void gemv_streams(const RowGroup<ROWS>& group, const Weights& weights, size_t output, size_t count) {
    constexpr size_t WIDTH = CHUNK * 8 / BITS, PASS = std::max(CHUNKS, 1) * CHUNK;  // inputs of a chunk; bytes
    const size_t bytes = weights.row_bytes(), stride = round_up(weights.blocks() + LANES, LANES);
    static thread_local Scratch<float> scratch;
    float* const factors = scratch.of(STREAMS * ROWS * stride);
    const size_t lanes = weights.block_size * LANES / WIDTH;  // per block, if a chunk has several
    const Spread spread(lanes ? std::min(lanes, LANES) : LANES);
    for (size_t end = output + count; output < end; ++output) {
        Floats totals[STREAMS][ROWS];
        const uint8_t* values[STREAMS];
        for (size_t i = 0; i < STREAMS; ++i) {
            values[i] = weights.values + (output + i * count) * bytes;
            for (size_t row = 0; row < ROWS; ++row) {
                float* const own = factors + (i * ROWS + row) * stride;
                totals[i][row] = scale_blocks(group.rows[row], weights, output + i * count, own);
            }
        }
        for (size_t start = 0, input = 0, block = 0; start < bytes; start += PASS, input += PASS * 8 / BITS, ++block) {
#pragma GCC unroll 4
            for (size_t i = 0; i < STREAMS; ++i) {
                Ints sums[ROWS];
                for (size_t row = 0; row < ROWS; ++row) sums[row] = broadcast_int(0);
#pragma GCC unroll 4
                for (size_t chunk = 0; chunk < PASS / CHUNK; ++chunk) {
                    const uint8_t* const from = values[i] + start + chunk * CHUNK;
                    prefetch<STREAMS>(from);
                    const Unpacked<BITS> unpacked(CHUNKS ? load_bytes(from) : load_bytes(from, bytes - start));
#pragma GCC unroll 4
                    for (size_t row = 0; row < ROWS; ++row)
                        sums[row] = unpacked.dot(sums[row], group.rows[row].values + input + chunk * WIDTH);
                }
#pragma GCC unroll 4
                for (size_t row = 0; row < ROWS; ++row) {
                    const float* const own = factors + (i * ROWS + row) * stride;
                    const Floats scale = CHUNKS ? broadcast(own[block]) : spread(own + block * (LANES / lanes));
                    totals[i][row] = fma(to_floats(sums[row]), scale, totals[i][row]);
                }
            }
        }
        for (size_t i = 0; i < STREAMS; ++i)
            for (size_t row = 0; row < ROWS; ++row) {
                const size_t index = output + i * count;
                const float bias = weights.bias ? weights.bias[index] : 0;
                group.results[row][index] = reduce_add(totals[i][row]) + bias;
            }
    }
}

// Computes outputs from `output` to `end`. With more rows, arithmetic takes longer than the memory.
template <int BITS, int CHUNKS, size_t ROWS>
void gemv_rows(const RowGroup<ROWS>& group, const Weights& weights, size_t output, size_t end) {
    constexpr size_t STREAMS = ROWS == 1 ? MAX_STREAMS : MAX_STREAMS / 2;
    if (reads_streams()) {
        const size_t count = (end - output) / STREAMS;
        gemv_streams<BITS, CHUNKS, STREAMS>(group, weights, output, count);
        output += count * STREAMS;
    }
    gemv_streams<BITS, CHUNKS, 1>(group, weights, output, end - output);
}

template <size_t ROWS>
void gemv_rows(const RowGroup<ROWS>& group, const Weights& weights, size_t output, size_t end) {
    const size_t chunks = weights.block_size * weights.bits / 8 / CHUNK;
    static constexpr auto KERNELS = std::array{
        std::array{gemv_rows<4, 0, ROWS>, gemv_rows<4, 1, ROWS>, gemv_rows<4, 2, ROWS>},
        std::array{gemv_rows<8, 0, ROWS>, gemv_rows<8, 1, ROWS>, gemv_rows<8, 2, ROWS>}};
    const auto gemv = chunks > 2 ? gemv_rows<8, 4, ROWS> : KERNELS[weights.bits == 8][chunks];
    gemv(group, weights, output, end);
}

// Static quantization: unsigned inputs times signed weights. The sums of the weights are computed along with the dot
// products, for the zero point.
template <size_t ROWS>
void gemv_static(const RowGroup<ROWS>& group, const Weights& weights, size_t output, size_t end) {
    const Bytes ones = broadcast_byte(1);
    const int64_t zero_point = weights.static_quantization->zero_point - UNSIGNED_OFFSET;
    for (; output < end; ++output) {
        const uint8_t* values = weights.values + output * weights.inputs;
        Ints dots[ROWS], sums = broadcast_int(0);
        for (size_t row = 0; row < ROWS; ++row) dots[row] = broadcast_int(0);
        for (size_t start = 0; start < weights.inputs; start += CHUNK) {
            const Bytes chunk = load_bytes(values + start, weights.inputs - start);
#pragma GCC unroll 4
            for (size_t row = 0; row < ROWS; ++row)
                dots[row] = dot<8>(dots[row], load_bytes(group.rows[row].values + start), chunk);
            sums = dot<8>(sums, ones, chunk);
        }
        alignas(64) float scale[LANES];
        store(scale, load_scales(weights, output, 1));
        const float factor = scale[0] * weights.static_quantization->scale;
        for (size_t row = 0; row < ROWS; ++row) {
            const int64_t dot = reduce_add_ints(dots[row]) - zero_point * reduce_add_ints(sums);
            group.results[row][output] = float(dot) * factor + weights.bias[output];
        }
    }
}

// Computes outputs from `output` to `end` of rows from `row` on.
template <size_t ROWS>
void gemv_group(
    const GemvRows& rows, size_t row, const Weights& weights, size_t output, size_t end, float* result) {
    RowGroup<ROWS> group;
    for (size_t i = 0; i < ROWS; ++i) {
        group.rows[i] = rows[row + i];
        group.results[i] = result + (row + i) * weights.outputs;
    }
    if (weights.static_quantization) gemv_static(group, weights, output, end);
    else gemv_rows(group, weights, output, end);
}

// result [rows, outputs] of up to FEW_ROWS rows. Groups of one, two and four rows keep the library small.
inline void gemv(
    const QuantizedActivations& x, size_t rows, const Weights& weights, float* result, const Parallel& parallel) {
    constexpr size_t MIN_OUTPUTS = 64;  // few large tasks: each starts new streams from memory
    const size_t tasks = balanced_tasks(), per_task = std::max(MIN_OUTPUTS, (weights.outputs + tasks - 1) / tasks);
    const GemvRows prepared(x, rows, weights);
    parallel((weights.outputs + per_task - 1) / per_task, [&](size_t task) {
        const size_t output = task * per_task, end = std::min(weights.outputs, output + per_task);
        size_t row = 0;
        for (; row + 4 <= rows; row += 4) gemv_group<4>(prepared, row, weights, output, end, result);
        for (; row + 2 <= rows; row += 2) gemv_group<2>(prepared, row, weights, output, end, result);
        for (; row < rows; ++row) gemv_group<1>(prepared, row, weights, output, end, result);
    });
}

// Kernels of linear layers: GEMV for few rows, GEMM for more.

template <class Gemm>
void gemm(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    if (rows > FEW_ROWS) return Gemm::gemm(x, rows, weights, activation, result, parallel);
    gemv(quantize_activations(x, rows, 1, weights, activation, parallel), rows, weights, result, parallel);
}

template <class Gemm>
void mlp(const float* x, size_t rows, const Weights& up, const Weights& down, float* result, const Parallel& parallel) {
    if (rows > FEW_ROWS) return Gemm::mlp(x, rows, up, down, result, parallel);
    static thread_local Scratch<float> memory;
    float* const hidden = memory.of(rows * up.outputs);
    gemm<Gemm>(x, rows, up, Activation::NONE, hidden, parallel);
    gemm<Gemm>(hidden, rows, down, Activation::GELU, result, parallel);
}

}  // namespace fusion_edge::SIMD
