// GEMV: one row of activations. Bound by memory bandwidth: each weight is read once, in place, in chunks of 64 bytes.

#include <algorithm>
#include <atomic>

#include "gemm_kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

// A row of quantized activations, in the order of the weights.
struct Row {
    const int8_t* values;      // [chunks, 64] or, for 4 bits, [chunks, 2, 64]: inputs of low, then of high halves
    const float* scales;       // [blocks]
    const float* corrections;  // [blocks]: scale * sum, from which the zero points are corrected
};

// Reorders 4-bit inputs for GEMV and computes the corrections.
Row prepare(const QuantizedActivations& x, const Weights& weights) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> corrections;
    const size_t blocks = weights.blocks();
    float* correction = corrections.of(blocks);
    for (size_t block = 0; block < blocks; ++block)
        correction[block] = x.scales[block] * float(x.sums[block]);
    if (weights.bits == 8) return {x.values, x.scales, correction};
    const size_t chunks = round_up(weights.row_bytes(), CHUNK) / CHUNK;
    int8_t* halves = values.of(chunks * 2 * CHUNK);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (size_t i = 0; i < chunks * 2 * CHUNK; i += 2 * CHUNK) {
        const __m512i left = _mm512_loadu_si512(x.values + i);
        const __m512i right = _mm512_loadu_si512(x.values + i + CHUNK);
        _mm512_store_si512(halves + i, _mm512_permutex2var_epi32(left, even, right));
        _mm512_store_si512(halves + i + CHUNK, _mm512_permutex2var_epi32(left, odd, right));
    }
    return {halves, x.scales, correction};
}

// Zero points of up to 16 blocks of an output; 1 if all blocks have the same one, which the sums already include.
__m512 zero_points(const Weights& weights, size_t output, size_t block) {
    if (!weights.zero_points) return _mm512_set1_ps(1);
    const uint8_t* row = weights.zero_points + output * weights.zero_point_bytes() + block * weights.bits / 8;
    const size_t bytes = (std::min(LANES, weights.blocks() - block) * weights.bits + 7) / 8;
    __m128i points = _mm_maskz_loadu_epi8(lane_mask(bytes), row);
    if (weights.bits == 4) {
        const __m128i half = _mm_set1_epi8(15);
        points = _mm_unpacklo_epi8(_mm_and_si128(points, half), _mm_and_si128(_mm_srli_epi16(points, 4), half));
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(points));
}

template <int BITS>
__m512i dot(__m512i sums, __m512i weights, const int8_t* x) {
    if (BITS == 8) return _mm512_dpbusd_epi32(sums, weights, _mm512_loadu_si512(x));
    const __m512i half = _mm512_set1_epi8(15);
    sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(weights, half), _mm512_loadu_si512(x));
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(weights, 4), half);
    return _mm512_dpbusd_epi32(sums, high, _mm512_loadu_si512(x + CHUNK));
}

// Number of outputs read in turns, each a separate stream in memory. Measured: on Zen 4, one stream is fastest (two take
// twice as long, and software prefetch costs 10 %). On Ice Lake, four streams are 1.25 times as fast as one, and 1.45
// times with software prefetch.
constexpr size_t MAX_STREAMS = 4;
constexpr size_t PREFETCH_DISTANCE = 1024;  // bytes

std::atomic<bool> reads_streams = bool(__builtin_cpu_is("intel"));

// Prefetches ahead in a stream, if there are several.
template <size_t STREAMS>
[[gnu::always_inline]] inline void prefetch(const uint8_t* values) {
    if constexpr (STREAMS > 1) _mm_prefetch(reinterpret_cast<const char*>(values) + PREFETCH_DISTANCE, _MM_HINT_T0);
}

// Writes the factor of each block's integer sum. Returns the correction for the zero points, not summed over lanes.
__m512 scale_blocks(const Row& row, const Weights& weights, size_t output, float* factors) {
    const size_t blocks = weights.blocks();
    __m512 total = _mm512_setzero_ps();
    for (size_t block = 0; block < blocks; block += LANES) {
        const __mmask16 mask = lane_mask(blocks - block);
        const __m512 scale = load_scales(weights, output * blocks + block, mask);
        _mm512_storeu_ps(factors + block, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, row.scales + block)));
        const __m512 correction = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, row.corrections + block));
        total = _mm512_fmadd_ps(correction, zero_points(weights, output, block), total);
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
    const __m512i block_of_lane = _mm512_srl_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm_cvtsi32_si128(__builtin_ctzll(lanes | LANES)));
    for (size_t end = output + count; output < end; ++output) {
        __m512 totals[STREAMS];
        const uint8_t* values[STREAMS];
        for (size_t i = 0; i < STREAMS; ++i) {
            totals[i] = scale_blocks(row, weights, output + i * count, factors + i * stride);
            values[i] = weights.values + (output + i * count) * bytes;
        }
        const int8_t* x = row.values;
        for (size_t start = 0, block = 0; start < bytes; start += std::max(CHUNKS, 1) * CHUNK, ++block) {
#pragma GCC unroll 4
            for (size_t i = 0; i < STREAMS; ++i) {
                __m512i sums = _mm512_setzero_si512();
                __m512 scale;
                if constexpr (CHUNKS > 0) {
#pragma GCC unroll 4
                    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                        const uint8_t* from = values[i] + start + chunk * CHUNK;
                        prefetch<STREAMS>(from);
                        sums = dot<BITS>(sums, _mm512_loadu_si512(from), x + chunk * WIDTH);
                    }
                    scale = _mm512_set1_ps(factors[i * stride + block]);
                } else {
                    const __mmask64 mask = bytes - start >= CHUNK ? ~0ull : (1ull << (bytes - start)) - 1;
                    prefetch<STREAMS>(values[i] + start);
                    sums = dot<BITS>(sums, _mm512_maskz_loadu_epi8(mask, values[i] + start), x);
                    const float* block_factors = factors + i * stride + block * (LANES / lanes);
                    scale = _mm512_permutexvar_ps(block_of_lane, _mm512_loadu_ps(block_factors));
                }
                totals[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, totals[i]);
            }
            x += std::max(CHUNKS, 1) * WIDTH;
        }
        for (size_t i = 0; i < STREAMS; ++i) {
            const size_t index = output + i * count;
            result[index] = _mm512_reduce_add_ps(totals[i]) + (weights.bias ? weights.bias[index] : 0);
        }
    }
}

// Computes outputs from `output` to `end`.
template <int BITS, int CHUNKS>
void gemv_rows(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    if (reads_streams) {
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
void gemv_static(
    const QuantizedActivations& x, const Weights& weights, size_t output, size_t end, float* result) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (; output < end; ++output) {
        const uint8_t* values = weights.values + output * weights.inputs;
        __m512i dots = _mm512_setzero_si512(), sums = _mm512_setzero_si512();
        for (size_t start = 0; start < weights.inputs; start += CHUNK) {
            const size_t count = weights.inputs - start;
            const __mmask64 mask = count >= CHUNK ? ~0ull : (1ull << count) - 1;
            const __m512i chunk = _mm512_maskz_loadu_epi8(mask, values + start);
            dots = _mm512_dpbusd_epi32(dots, _mm512_loadu_si512(x.values + start), chunk);
            sums = _mm512_dpbusd_epi32(sums, ones, chunk);
        }
        const int64_t dot = int64_t(_mm512_reduce_add_epi32(dots)) -
                            int64_t(weights.static_quantization->zero_point) * _mm512_reduce_add_epi32(sums);
        const float scale = _mm512_cvtss_f32(load_scales(weights, output, 1)) * weights.static_quantization->scale;
        result[output] = float(dot) * scale + weights.bias[output];
    }
}

}  // namespace

bool use_streams(bool enabled) { return reads_streams.exchange(enabled); }

void gemv(const QuantizedActivations& x, const Weights& weights, float* result, const Parallel& parallel) {
    // Few large tasks: each starts a new stream from memory. TASKS threads saturate memory bandwidth, so more threads
    // than tasks would not help.
    constexpr size_t TASKS = 16, MIN_OUTPUTS = 64;
    const size_t per_task = std::max(MIN_OUTPUTS, round_up(weights.outputs, TASKS) / TASKS);
    const Row row = weights.static_quantization ? Row{} : prepare(x, weights);
    parallel((weights.outputs + per_task - 1) / per_task, [&](size_t group) {
        const size_t output = group * per_task, end = std::min(weights.outputs, output + per_task);
        if (weights.static_quantization) gemv_static(x, weights, output, end, result);
        else if (weights.bits == 4) gemv_rows<4>(row, weights, output, end, result);
        else gemv_rows<8>(row, weights, output, end, result);
    });
}

}  // namespace fusion_edge
