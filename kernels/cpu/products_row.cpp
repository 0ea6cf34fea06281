// One row: every weight is read once, as it lies: 64 bytes (a chunk) of an output after the other.

#include <algorithm>
#include <atomic>

#include "products_parts.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

// What the products of one row with all outputs share.
struct Row {
    const int8_t* values;      // [chunks, 64 or, of 4 bits, 2 x 64]: those of low halves, then those of high ones
    const float* scales;       // [blocks]
    const float* corrections;  // [blocks]: times a weight's scale (and zero point), what its block's product has too much
};

Row order(const Rounded& rounded, const Weights& weights) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> corrections;
    const size_t blocks = weights.blocks();
    float* correction = corrections.of(blocks);
    for (size_t block = 0; block < blocks; ++block)
        correction[block] = rounded.scales[block] * float(rounded.sums[block]);
    if (weights.bits == 8) return {rounded.values, rounded.scales, correction};
    const size_t chunks = round_up(weights.row_bytes(), CHUNK) / CHUNK;
    int8_t* halves = values.of(chunks * 2 * CHUNK);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (size_t i = 0; i < chunks * 2 * CHUNK; i += 2 * CHUNK) {
        const __m512i left = _mm512_loadu_si512(rounded.values + i);
        const __m512i right = _mm512_loadu_si512(rounded.values + i + CHUNK);
        _mm512_store_si512(halves + i, _mm512_permutex2var_epi32(left, even, right));
        _mm512_store_si512(halves + i + CHUNK, _mm512_permutex2var_epi32(left, odd, right));
    }
    return {halves, rounded.scales, correction};
}

// Zero points of 16 blocks of an output, or of the fewer that it has from there on; 1 where sums were multiplied already.
__m512 zero_points(const Weights& weights, size_t output, size_t block) {
    if (!weights.zero_points) return _mm512_set1_ps(1);
    const uint8_t* row = weights.zero_points + output * weights.zero_point_bytes() + block * weights.bits / 8;
    const size_t bytes = (std::min(LANES, weights.blocks() - block) * weights.bits + 7) / 8;
    __m128i points = _mm_maskz_loadu_epi8(first(bytes), row);
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

// How many outputs, far apart, are read by turns. AMD's processors read memory fastest in one stream (Zen 4: two took twice
// as long, and fetching early by instructions cost a tenth), Intel's in several, fetched early (Ice Lake: four are 1.25
// times as fast as one, and 1.45 times with what they need a little later).
constexpr size_t MOST_STREAMS = 4;
constexpr size_t AHEAD = 1024;  // bytes

std::atomic<bool> reads_streams = bool(__builtin_cpu_is("intel"));

// Has what comes later in a stream fetched, if there are several.
template <size_t STREAMS>
[[gnu::always_inline]] inline void fetch(const uint8_t* values) {
    if constexpr (STREAMS > 1) _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
}

// Factors of the products of an output's blocks, and what their sum has too much.
__m512 scale_blocks(const Row& row, const Weights& weights, size_t output, float* factors) {
    const size_t blocks = weights.blocks();
    __m512 total = _mm512_setzero_ps();
    for (size_t block = 0; block < blocks; block += LANES) {
        const __mmask16 mask = first(blocks - block);
        const __m512 scale = scales(weights, output * blocks + block, mask);
        _mm512_storeu_ps(factors + block, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, row.scales + block)));
        const __m512 correction = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, row.corrections + block));
        total = _mm512_fmadd_ps(correction, zero_points(weights, output, block), total);
    }
    return total;
}

// Products of one row with `count` outputs of each of some streams, which are as many outputs apart. A block has CHUNKS
// chunks; if 0, a chunk has several blocks.
template <int BITS, int CHUNKS, size_t STREAMS>
void multiply_streams(const Row& row, const Weights& weights, size_t output, size_t count, float* result) {
    constexpr size_t WIDTH = CHUNK * 8 / BITS;
    const size_t bytes = weights.row_bytes(), stride = round_up(weights.blocks() + LANES, LANES);
    static thread_local Scratch<float> scratch;
    float* const factors = scratch.of(STREAMS * stride);  // of a block's product
    const size_t lanes = weights.block_size * LANES / WIDTH;  // of a block, if it is smaller than a chunk
    const __m512i place = _mm512_srl_epi32(
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
                        fetch<STREAMS>(from);
                        sums = dot<BITS>(sums, _mm512_loadu_si512(from), x + chunk * WIDTH);
                    }
                    scale = _mm512_set1_ps(factors[i * stride + block]);
                } else {
                    const __mmask64 mask = bytes - start >= CHUNK ? ~0ull : (1ull << (bytes - start)) - 1;
                    fetch<STREAMS>(values[i] + start);
                    sums = dot<BITS>(sums, _mm512_maskz_loadu_epi8(mask, values[i] + start), x);
                    const float* own = factors + i * stride + block * (LANES / lanes);
                    scale = _mm512_permutexvar_ps(place, _mm512_loadu_ps(own));
                }
                totals[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, totals[i]);
            }
            x += std::max(CHUNKS, 1) * WIDTH;
        }
        for (size_t i = 0; i < STREAMS; ++i) {
            const size_t own = output + i * count;
            result[own] = _mm512_reduce_add_ps(totals[i]) + (weights.bias ? weights.bias[own] : 0);
        }
    }
}

// Products of one row with some outputs.
template <int BITS, int CHUNKS>
void multiply_some(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    if (reads_streams) {
        const size_t count = (end - output) / MOST_STREAMS;
        multiply_streams<BITS, CHUNKS, MOST_STREAMS>(row, weights, output, count, result);
        output += count * MOST_STREAMS;
    }
    multiply_streams<BITS, CHUNKS, 1>(row, weights, output, end - output, result);
}

template <int BITS>
void multiply_some(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    const size_t chunks = weights.block_size * BITS / 8 / CHUNK;
    const auto multiply = chunks == 0   ? multiply_some<BITS, 0>
                          : chunks == 1 ? multiply_some<BITS, 1>
                          : chunks == 2 ? multiply_some<BITS, 2>
                                        : multiply_some<BITS, 4>;
    multiply(row, weights, output, end, result);
}

// Products of one row with some outputs, of signed weights and inputs whose rounding was given. The weights' sum, for the
// zero point, comes beside the product.
void multiply_given(const Rounded& rounded, const Weights& weights, size_t output, size_t end, float* result) {
    const __m512i one_each = _mm512_set1_epi8(1);
    for (; output < end; ++output) {
        const uint8_t* values = weights.values + output * weights.inputs;
        __m512i products = _mm512_setzero_si512(), sums = _mm512_setzero_si512();
        for (size_t start = 0; start < weights.inputs; start += CHUNK) {
            const size_t count = weights.inputs - start;
            const __mmask64 mask = count >= CHUNK ? ~0ull : (1ull << count) - 1;
            const __m512i own = _mm512_maskz_loadu_epi8(mask, values + start);
            products = _mm512_dpbusd_epi32(products, _mm512_loadu_si512(rounded.values + start), own);
            sums = _mm512_dpbusd_epi32(sums, one_each, own);
        }
        const int64_t product = int64_t(_mm512_reduce_add_epi32(products)) -
                                int64_t(weights.given->zero_point) * _mm512_reduce_add_epi32(sums);
        const float scale = _mm512_cvtss_f32(scales(weights, output, 1)) * weights.given->scale;
        result[output] = float(product) * scale + weights.bias[output];
    }
}

}  // namespace

bool use_streams(bool wanted) { return reads_streams.exchange(wanted); }

void multiply_row(const Rounded& rounded, const Weights& weights, float* result, const Parallel& parallel) {
    // Few large parts: each begins a stream from memory anew. More threads than parts would find nothing to do, but
    // memory is shared by then.
    constexpr size_t TASKS = 16, LEAST = 64;
    const size_t together = std::max(LEAST, round_up(weights.outputs, TASKS) / TASKS);
    const Row row = weights.given ? Row{} : order(rounded, weights);
    parallel((weights.outputs + together - 1) / together, [&](size_t group) {
        const size_t output = group * together, end = std::min(weights.outputs, output + together);
        if (weights.given) multiply_given(rounded, weights, output, end, result);
        else if (weights.bits == 4) multiply_some<4>(row, weights, output, end, result);
        else multiply_some<8>(row, weights, output, end, result);
    });
}

}  // namespace fusion_edge
