// Many rows: the weights of 48 outputs are put side by side, four inputs of each, and multiplied with eight rows at a
// time. An instruction that brings a row's inputs to all lanes serves three products: where each product reads them
// itself (twelve rows by 32 outputs), loads are what takes the time.

#include <algorithm>
#include <array>
#include <utility>

#include "products_parts.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t REGISTERS = 3;               // of outputs
constexpr size_t PANEL = REGISTERS * LANES;  // outputs of a tile
constexpr size_t MOST_PANELS = 8;    // that a thread multiplies a tile of rows with in turn

struct Panel {
    const uint8_t* values;       // [inputs / 4, PANEL, 4]; of 4 bits, in the order of the inputs of Rounded
    const float* scales;         // [blocks, PANEL]
    const int32_t* zero_points;  // [blocks, PANEL]; not filled if all are the same
    const float* bias;           // [PANEL]
};

// Memory of the panels that a thread has at the same time.
struct PanelScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zero_points;
    alignas(64) float bias[PANEL];
};

// Values of some outputs, and the sum of each one's if they are signed.
void pack_values(const Weights& weights, size_t output, size_t count, uint8_t* to, int32_t* sums) {
    const size_t bytes = weights.row_bytes();
    const __m512i sign = _mm512_set1_epi8(weights.given ? -128 : 0), one_each = _mm512_set1_epi8(1);
    __m512i totals[PANEL] = {};
    const __m512i half = _mm512_set1_epi8(15);
    // Read below in many places by turns, they would come slowly: memory is quickest in its own order.
    const char* const all = reinterpret_cast<const char*>(weights.values + output * bytes);
    for (size_t start = 0; start < count * bytes; start += CHUNK) _mm_prefetch(all + start, _MM_HINT_T1);
    for (size_t start = 0; start < bytes; start += CHUNK) {
        const __mmask64 mask = bytes - start >= CHUNK ? ~0ull : (1ull << (bytes - start)) - 1;
        for (size_t side = 0; side < REGISTERS; ++side) {
            __m512i rows[LANES];
            for (size_t i = 0; i < LANES; ++i) {
                const size_t one = side * LANES + i;
                const uint8_t* from = weights.values + (output + one) * bytes + start;
                rows[i] = one < count ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
                if (weights.given) totals[one] = _mm512_dpbusd_epi32(totals[one], one_each, rows[i]);
                rows[i] = _mm512_xor_si512(rows[i], sign);
            }
            transpose(rows);
            for (size_t i = 0; i < LANES; ++i) {
                uint8_t* step = to + (start / STEP + i) * (8 / weights.bits) * STEP * PANEL + side * CHUNK;
                if (weights.bits == 8) {
                    _mm512_store_si512(step, rows[i]);
                } else {
                    _mm512_store_si512(step, _mm512_and_si512(rows[i], half));
                    _mm512_store_si512(step + STEP * PANEL, _mm512_and_si512(_mm512_srli_epi16(rows[i], 4), half));
                }
            }
        }
    }
    for (size_t i = 0; i < PANEL; ++i) sums[i] = _mm512_reduce_add_epi32(totals[i]);
}

Panel pack(const Weights& weights, size_t output, PanelScratch& scratch) {
    const size_t blocks = weights.blocks(), count = std::min(PANEL, weights.outputs - output);
    uint8_t* to = scratch.values.of(round_up(weights.row_bytes(), CHUNK) * (8 / weights.bits) * PANEL);
    int32_t sums[PANEL];
    pack_values(weights, output, count, to, sums);
    float* own = scratch.scales.of(round_up(blocks, LANES) * PANEL);
    for (size_t block = 0; block < blocks; block += LANES)
        for (size_t side = 0; side < REGISTERS; ++side) {
            __m512i rows[LANES];
            for (size_t i = 0; i < LANES; ++i) {
                const size_t one = side * LANES + i;
                const __mmask16 mask = one < count ? first(blocks - block) : 0;
                rows[i] = _mm512_castps_si512(scales(weights, (output + one) * blocks + block, mask));
            }
            transpose(rows);
            for (size_t i = 0; i < LANES; ++i) _mm512_store_si512(own + (block + i) * PANEL + side * LANES, rows[i]);
        }
    int32_t* zero = scratch.zero_points.of(blocks * PANEL);
    for (size_t i = 0; weights.zero_points && i < count; ++i) {
        const uint8_t* row = weights.zero_points + (output + i) * weights.zero_point_bytes();
        for (size_t block = 0; block < blocks; ++block)
            zero[block * PANEL + i] = weights.bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
    }
    for (size_t i = 0; i < PANEL; ++i) {
        scratch.bias[i] = weights.bias && i < count ? weights.bias[output + i] : 0;
        // Rounded inputs are less by 128 than what was given says, whose zero point is not theirs.
        if (weights.given)
            scratch.bias[i] += double(128 - weights.given->zero_point) * sums[i] * own[i] * weights.given->scale;
    }
    return {to, own, zero, scratch.bias};
}

// What follows is written down as instructions: with intrinsics GCC 12 copies every sum in turn, and keeps totals twice.

// Of a row: for each output.
using Sums = __m512i[REGISTERS];

// In each lane the same.
[[gnu::always_inline]] inline __m512i broadcast(const int32_t* value) {
    __m512i values;
    asm volatile("vpbroadcastd %1, %0" : "=v"(values) : "m"(*value));
    return values;
}

// Adds to each lane the product of its four weights and four inputs.
[[gnu::always_inline]] inline void add_products(Sums& sums, const Sums& weights, const int8_t* x) {
    __m512i inputs;
    asm("vpbroadcastd %7, %3\n\tvpdpbusd %3, %4, %0\n\tvpdpbusd %3, %5, %1\n\tvpdpbusd %3, %6, %2"
        : "+v"(sums[0]), "+v"(sums[1]), "+v"(sums[2]), "=&v"(inputs)
        : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(*reinterpret_cast<const int32_t*>(x)));
}

// Adds sums of a block, each times its weights' scale and its inputs', to the totals of 16 outputs. The sums are gone then.
[[gnu::always_inline]] inline void add_block(__m512i& sums, __m512 scales, const float* x_scale, float* totals) {
    __m512 product;
    asm("vmulps %4%{1to16%}, %3, %2\n\tvcvtdq2ps %0, %0\n\tvfmadd213ps %1, %2, %0\n\tvmovaps %0, %1"
        : "+v"(sums), "+m"(*reinterpret_cast<float(*)[LANES]>(totals)), "=&v"(product)
        : "v"(scales), "m"(*x_scale));
}

// Rows that come next, a little with each step: they would come too late from beyond the second-level cache, and all at
// once they would hold up what is needed now.
struct Next {
    const int8_t* values;
    size_t stride;  // bytes a step
};

// The places I of some rows are constants from the start: only so does GCC keep the sums in registers.
template <bool SYMMETRIC, size_t... I>
void multiply_rows(
    std::index_sequence<I...>, const Panel& panel, const Rounded& tile, size_t block_size, Next next, float* result) {
    constexpr size_t ROWS = sizeof...(I);
    const uint8_t* weight = panel.values;
    const int8_t* x = tile.values;
    const float* x_scales = tile.scales;
    const int32_t* x_sums = tile.sums;
    for (size_t i = 0; i < ROWS * PANEL; i += LANES) _mm512_store_ps(result + i, _mm512_setzero_ps());
    for (size_t block = 0; block < tile.blocks; ++block, x_scales += TILE_ROWS, x_sums += TILE_ROWS) {
        Sums sums[ROWS];
        if constexpr (SYMMETRIC) {
            ((sums[I][0] = sums[I][1] = sums[I][2] = broadcast(x_sums + I)), ...);
        } else {
            const int32_t* zero = panel.zero_points + block * PANEL;
#pragma GCC unroll 3
            for (size_t i = 0; i < REGISTERS; ++i) {
                const __m512i zeros = _mm512_load_si512(zero + i * LANES);
                ((sums[I][i] = _mm512_mullo_epi32(_mm512_set1_epi32(x_sums[I]), zeros)), ...);
            }
        }
        for (size_t step = 0; step < block_size / STEP; ++step, weight += STEP * PANEL, x += STEP * TILE_ROWS) {
            const Sums weights = {
                _mm512_load_si512(weight), _mm512_load_si512(weight + CHUNK), _mm512_load_si512(weight + 2 * CHUNK)};
            (add_products(sums[I], weights, x + I * STEP), ...);
            _mm_prefetch(next.values, _MM_HINT_T1);
            next.values += next.stride;
        }
        float* totals = result;
        asm("" : "+r"(totals));  // one address for all, not one for each
#pragma GCC unroll 3
        for (size_t i = 0; i < REGISTERS; ++i) {
            const __m512 scales = _mm512_load_ps(panel.scales + block * PANEL + i * LANES);
            (add_block(sums[I][i], scales, x_scales + I, totals + I * PANEL + i * LANES), ...);
        }
    }
}

using Tile = void (*)(const Panel&, const Rounded&, size_t, Next, float*);

template <bool SYMMETRIC, size_t ROWS>
void multiply_tile(const Panel& panel, const Rounded& tile, size_t block_size, Next next, float* result) {
    multiply_rows<SYMMETRIC>(std::make_index_sequence<ROWS>(), panel, tile, block_size, next, result);
}

// For every number of rows, less one.
template <bool SYMMETRIC, size_t... I>
constexpr std::array<Tile, TILE_ROWS> tiles(std::index_sequence<I...>) {
    return {multiply_tile<SYMMETRIC, I + 1>...};
}

// Sums of a tile with the bias to their places; as a stream past the caches, if they are too small for all results.
template <bool STREAMS>
void write_tile(const float* sums, const float* bias, size_t rows, size_t count, size_t stride, float* result) {
    for (size_t i = 0; i < rows; ++i)
        for (size_t j = 0; j < count; j += LANES) {
            const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + j), _mm512_load_ps(bias + j));
            float* to = result + i * stride + j;
            if (STREAMS) _mm512_stream_ps(to, sum);
            else _mm512_mask_storeu_ps(to, first(count - j), sum);
        }
}

// Products of all rows with the outputs of some panels, which are all that a tile of rows is read for.
void multiply_panels(
    const Rounded& rounded, size_t rows, const Weights& weights, size_t start, size_t end, float* result) {
    constexpr auto ROWS = std::make_index_sequence<TILE_ROWS>();
    static constexpr auto SYMMETRIC = tiles<true>(ROWS), ASYMMETRIC = tiles<false>(ROWS);
    static thread_local std::array<PanelScratch, MOST_PANELS> scratch;
    const auto& multiply = weights.zero_points ? ASYMMETRIC : SYMMETRIC;
    std::array<Panel, MOST_PANELS> panels;
    for (size_t output = start, i = 0; output < end; output += PANEL, ++i)
        panels[i] = pack(weights, output, scratch[i]);
    constexpr size_t CACHED = 16 << 20;  // bytes of results
    const bool streams = rows * weights.outputs * sizeof(float) > CACHED && weights.outputs % LANES == 0 &&
                         reinterpret_cast<uintptr_t>(result) % CHUNK == 0;
    const auto write = streams ? write_tile<true> : write_tile<false>;
    const size_t stride = STEP * TILE_ROWS / ((end - start + PANEL - 1) / PANEL);
    alignas(64) float sums[TILE_ROWS * PANEL];
    for (size_t row = 0; row < rows; row += TILE_ROWS) {
        const size_t here = std::min(TILE_ROWS, rows - row);
        const Rounded tile = rounded.tile(row / TILE_ROWS, TILE_ROWS);
        const size_t size = row + TILE_ROWS < rows ? tile.steps * STEP * TILE_ROWS : 0;
        Next next{tile.values + size, size ? stride : 0};
        for (size_t output = start; output < end; output += PANEL) {
            const Panel& panel = panels[(output - start) / PANEL];
            float* const to = result + row * weights.outputs + output;
            for (size_t i = 0; i < here && !streams; ++i)
                for (size_t j = 0; j < PANEL; j += LANES) __builtin_prefetch(to + i * weights.outputs + j, 1);
            multiply[here - 1](panel, tile, weights.block_size, next, sums);
            next.values += tile.steps * next.stride;
            write(sums, panel.bias, here, std::min(PANEL, end - output), weights.outputs, to);
        }
    }
    if (streams) _mm_sfence();  // what is written so comes late to other threads otherwise
}

}  // namespace

void multiply_rows(
    const Rounded& rounded, size_t rows, const Weights& weights, float* result, const Parallel& parallel) {
    // As many panels as stay in a second-level cache, so that rows are read less often; but enough work for all threads.
    constexpr size_t CACHE = 512 << 10, TASKS = 16;
    const size_t panels = (weights.outputs + PANEL - 1) / PANEL;
    const size_t fitting = std::min(CACHE / (rounded.steps * STEP * PANEL), panels / TASKS);
    const size_t together = std::clamp<size_t>(fitting, 1, MOST_PANELS) * PANEL;
    parallel((weights.outputs + together - 1) / together, [&](size_t group) {
        const size_t start = group * together, end = std::min(weights.outputs, start + together);
        multiply_panels(rounded, rows, weights, start, end, result);
    });
}

}  // namespace fusion_edge
