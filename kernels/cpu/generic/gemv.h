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

template <int BITS>
[[gnu::always_inline]] inline Ints dot_chunk(Ints sums, Bytes weights, const int8_t* x) {
    if constexpr (BITS == 8) return dot<8>(sums, less_offset(weights), load_bytes(x));
    sums = dot<4>(sums, low_halves(weights), load_bytes(x));
    return dot<4>(sums, high_halves(weights), load_bytes(x + CHUNK));
}

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

// Computes STREAMS * count outputs in streams of `count` outputs each. A block has CHUNKS chunks; with 0, a chunk has
// several blocks.
template <int BITS, int CHUNKS, size_t STREAMS>
void gemv_streams(const Row& row, const Weights& weights, size_t output, size_t count, float* result) {
    constexpr size_t WIDTH = CHUNK * 8 / BITS;
    const size_t bytes = weights.row_bytes(), stride = round_up(weights.blocks() + LANES, LANES);
    static thread_local Scratch<float> scratch;
    float* const factors = scratch.of(STREAMS * stride);
    const size_t lanes = weights.block_size * LANES / WIDTH;  // per block, if a chunk has several
    const Spread spread(lanes ? std::min(lanes, LANES) : LANES);
    for (size_t end = output + count; output < end; ++output) {
        Floats totals[STREAMS];
        const uint8_t* values[STREAMS];
        for (size_t i = 0; i < STREAMS; ++i) {
            totals[i] = scale_blocks(row, weights, output + i * count, factors + i * stride);
            values[i] = weights.values + (output + i * count) * bytes;
        }
        const int8_t* x = row.values;
        for (size_t start = 0, block = 0; start < bytes; start += std::max(CHUNKS, 1) * CHUNK, ++block) {
#pragma GCC unroll 4
            for (size_t i = 0; i < STREAMS; ++i) {
                Ints sums = broadcast_int(0);
                Floats scale;
                if constexpr (CHUNKS > 0) {
#pragma GCC unroll 4
                    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                        const uint8_t* from = values[i] + start + chunk * CHUNK;
                        prefetch<STREAMS>(from);
                        sums = dot_chunk<BITS>(sums, load_bytes(from), x + chunk * WIDTH);
                    }
                    scale = broadcast(factors[i * stride + block]);
                } else {
                    prefetch<STREAMS>(values[i] + start);
                    sums = dot_chunk<BITS>(sums, load_bytes(values[i] + start, bytes - start), x);
                    scale = spread(factors + i * stride + block * (LANES / lanes));
                }
                totals[i] = fma(to_floats(sums), scale, totals[i]);
            }
            x += std::max(CHUNKS, 1) * WIDTH;
        }
        for (size_t i = 0; i < STREAMS; ++i) {
            const size_t index = output + i * count;
            result[index] = reduce_add(totals[i]) + (weights.bias ? weights.bias[index] : 0);
        }
    }
}

// Computes outputs from `output` to `end`.
template <int BITS, int CHUNKS>
void gemv_rows(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    if (reads_streams()) {
        const size_t count = (end - output) / MAX_STREAMS;
        gemv_streams<BITS, CHUNKS, MAX_STREAMS>(row, weights, output, count, result);
        output += count * MAX_STREAMS;
    }
    gemv_streams<BITS, CHUNKS, 1>(row, weights, output, end - output, result);
}

template <int BITS>
void gemv_rows(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    const size_t chunks = weights.block_size * BITS / 8 / CHUNK;
    const auto gemv = chunks == 0   ? gemv_rows<BITS, 0>
                      : chunks == 1 ? gemv_rows<BITS, 1>
                      : chunks == 2 ? gemv_rows<BITS, 2>
                                    : gemv_rows<BITS, 4>;
    gemv(row, weights, output, end, result);
}

// Static quantization: unsigned inputs times signed weights. The sums of the weights are computed along with the dot
// products, for the zero point.
inline void gemv_static(
    const QuantizedActivations& x, const Weights& weights, size_t output, size_t end, float* result) {
    const Bytes ones = broadcast_byte(1);
    const int64_t zero_point = weights.static_quantization->zero_point - UNSIGNED_OFFSET;
    for (; output < end; ++output) {
        const uint8_t* values = weights.values + output * weights.inputs;
        Ints dots = broadcast_int(0), sums = broadcast_int(0);
        for (size_t start = 0; start < weights.inputs; start += CHUNK) {
            const Bytes chunk = load_bytes(values + start, weights.inputs - start);
            dots = dot<8>(dots, load_bytes(x.values + start), chunk);
            sums = dot<8>(sums, ones, chunk);
        }
        const int64_t dot = reduce_add_ints(dots) - zero_point * reduce_add_ints(sums);
        alignas(64) float scale[LANES];
        store(scale, load_scales(weights, output, 1));
        result[output] = float(dot) * (scale[0] * weights.static_quantization->scale) + weights.bias[output];
    }
}

// result [rows, outputs] of up to FEW_ROWS rows.
inline void gemv(
    const QuantizedActivations& x, size_t rows, const Weights& weights, float* result, const Parallel& parallel) {
    // Few large tasks: each starts a new stream from memory.
    constexpr size_t MIN_OUTPUTS = 64;
    constexpr size_t CACHED_OUTPUTS = 16;  // whose weights stay in the L1 cache for the other rows
    const size_t tasks = balanced_tasks(), per_task = std::max(MIN_OUTPUTS, (weights.outputs + tasks - 1) / tasks);
    const GemvRows prepared(x, rows, weights);
    parallel((weights.outputs + per_task - 1) / per_task, [&](size_t group) {
        const size_t last = std::min(weights.outputs, (group + 1) * per_task);
        const size_t step = rows == 1 ? per_task : CACHED_OUTPUTS;
        for (size_t output = group * per_task; output < last; output += step)
            for (size_t row = 0; row < rows; ++row) {
                const size_t end = std::min(last, output + step);
                float* const to = result + row * weights.outputs;
                if (weights.static_quantization) gemv_static(x.tile(row, 1), weights, output, end, to);
                else if (weights.bits == 4) gemv_rows<4>(prepared[row], weights, output, end, to);
                else gemv_rows<8>(prepared[row], weights, output, end, to);
            }
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
