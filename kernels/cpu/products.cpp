#include "products.h"

#include <algorithm>
#include <array>
#include <utility>

#include "lanes.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t TILE_ROWS = 12;     // with two registers of outputs: 24 of the 32 registers are sums
constexpr size_t PANEL = 2 * LANES;  // outputs of a tile
constexpr size_t MOST_PANELS = 8;    // that a thread multiplies a tile of rows with in turn

constexpr size_t LARGEST_BLOCK = 256;

constexpr float SMALLEST_EXTENT = 1e-30f;  // of inputs: what is smaller counts as 0, as 127 over it would not be finite

constexpr size_t STEP = 4;  // inputs that an instruction multiplies and adds in each lane

// Rows of inputs in int8, a tile of so many side by side: by turns four inputs of each, so that a product reads one
// stream. Of every 8 values, those of even places come before those of odd ones if weights have 4 bits, as the halves of
// the weights' bytes do.
struct Rounded {
    int8_t* values;  // [tiles, steps, rows of a tile, 4], zero behind the last input
    float* scales;   // [tiles, blocks, rows of a tile]
    int32_t* sums;   // [tiles, blocks, rows of a tile]: minus the sum of the values, times the zero point if all have one
    size_t steps, blocks;

    // A tile of so many rows.
    Rounded tile(size_t index, size_t rows) const {
        return {
            values + index * steps * rows * STEP, scales + index * blocks * rows, sums + index * blocks * rows, steps,
            blocks};
    }
};

size_t steps(const Weights& weights) { return round_up(weights.blocks() * weights.block_size, 128) / STEP; }

// Some inputs of a row that share a scale.
void round_block(const float* x, size_t count, const Weights& weights, int8_t* values, float* scale, int32_t* sum) {
    const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    __m512 largest = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += LANES)
        largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(first(count - i), x + i)));
    float extent = _mm512_reduce_max_ps(largest);
    if (extent < SMALLEST_EXTENT) extent = 0;
    const __m512 inverse = _mm512_set1_ps(extent > 0 ? 127 / extent : 0);
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i < weights.block_size; i += LANES) {
        const __mmask16 mask = i < count ? first(count - i) : 0;
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        total = _mm512_sub_epi32(total, rounded);
        __m128i bytes = _mm512_cvtsepi32_epi8(rounded);
        if (weights.bits == 4) bytes = _mm_shuffle_epi8(bytes, halves);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), bytes);
    }
    *scale = extent / 127;
    *sum = _mm512_reduce_add_epi32(total) << (weights.zero_points ? 0 : weights.bits - 1);
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

// Rows in tiles; missing ones of the last tile are not filled.
Rounded round(const float* x, size_t rows, size_t of_tile, const Weights& weights, const Parallel& parallel) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> scales;
    static thread_local Scratch<int32_t> sums;
    const size_t blocks = weights.blocks(), row_steps = steps(weights), tiles = (rows + of_tile - 1) / of_tile;
    const size_t all = tiles * of_tile, end = blocks * weights.block_size;
    const Rounded rounded{
        values.of(all * row_steps * STEP), scales.of(all * blocks), sums.of(all * blocks), row_steps, blocks};
    parallel(tiles, [&](size_t index) {
        const Rounded tile = rounded.tile(index, of_tile);
        const size_t here = std::min(of_tile, rows - index * of_tile);
        const float* from = x + index * of_tile * weights.inputs;
        alignas(64) int8_t buffer[LANES * LARGEST_BLOCK] = {};
        for (size_t block = 0, start = 0; block < blocks; ++block, start += weights.block_size) {
            const size_t count = std::min(weights.block_size, weights.inputs - start), place = block * of_tile;
            int8_t* to = tile.values + start * of_tile;
            for (size_t i = 0; i < here; ++i)
                round_block(
                    from + i * weights.inputs + start, count, weights, of_tile == 1 ? to : buffer + i * LARGEST_BLOCK,
                    tile.scales + place + i, tile.sums + place + i);
            if (of_tile > 1) interleave(buffer, weights.block_size, to);
        }
        std::fill(tile.values + end * of_tile, tile.values + row_steps * STEP * of_tile, 0);
    });
    return rounded;
}

// 16 scales from a place on, zero where there is none.
[[gnu::always_inline]] inline __m512 scales(const Weights& weights, size_t place, __mmask16 mask) {
    if (!weights.half_scales) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(weights.scales) + place);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(weights.scales) + place));
}

// One row ------------------------------------------------------------------------------------------------------------
// Every weight is read once, as it lies: 64 bytes (a chunk) of an output after the other. Memory is quickest so: several
// outputs at a time halved the speed, fetching early by instructions cost a tenth.

constexpr size_t CHUNK = 64;

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

// Products of one row with some outputs. A block has CHUNKS chunks; if 0, a chunk has several blocks.
template <int BITS, int CHUNKS>
void multiply_row(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    constexpr size_t WIDTH = CHUNK * 8 / BITS;
    const size_t bytes = weights.row_bytes(), blocks = weights.blocks();
    static thread_local Scratch<float> scratch;
    float* factors = scratch.of(blocks + LANES);  // of a block's product
    const uint8_t* values = weights.values + output * bytes;
    const size_t lanes = weights.block_size * LANES / WIDTH;  // of a block, if it is smaller than a chunk
    const __m512i place = _mm512_srl_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm_cvtsi32_si128(__builtin_ctzll(lanes | LANES)));
    for (; output < end; ++output, values += bytes) {
        __m512 total = _mm512_setzero_ps();
        for (size_t block = 0; block < blocks; block += LANES) {
            const __mmask16 mask = first(blocks - block);
            const __m512 scale = scales(weights, output * blocks + block, mask);
            _mm512_storeu_ps(factors + block, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, row.scales + block)));
            const __m512 correction = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, row.corrections + block));
            total = _mm512_fmadd_ps(correction, zero_points(weights, output, block), total);
        }
        const int8_t* x = row.values;
        for (size_t start = 0, block = 0; start < bytes; start += std::max(CHUNKS, 1) * CHUNK, ++block) {
            __m512i sums = _mm512_setzero_si512();
            if constexpr (CHUNKS > 0) {
#pragma GCC unroll 4
                for (int chunk = 0; chunk < CHUNKS; ++chunk, x += WIDTH) {
                    sums = dot<BITS>(sums, _mm512_loadu_si512(values + start + chunk * CHUNK), x);
                }
                total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(factors[block]), total);
            } else {
                const __mmask64 mask = bytes - start >= CHUNK ? ~0ull : (1ull << (bytes - start)) - 1;
                sums = dot<BITS>(sums, _mm512_maskz_loadu_epi8(mask, values + start), x);
                const __m512 scale = _mm512_permutexvar_ps(place, _mm512_loadu_ps(factors + block * (LANES / lanes)));
                total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, total);
                x += WIDTH;
            }
        }
        result[output] = _mm512_reduce_add_ps(total) + (weights.bias ? weights.bias[output] : 0);
    }
}

template <int BITS>
void multiply_row(const Row& row, const Weights& weights, size_t output, size_t end, float* result) {
    const size_t chunks = weights.block_size * BITS / 8 / CHUNK;
    const auto multiply = chunks == 0   ? multiply_row<BITS, 0>
                          : chunks == 1 ? multiply_row<BITS, 1>
                          : chunks == 2 ? multiply_row<BITS, 2>
                                        : multiply_row<BITS, 4>;
    multiply(row, weights, output, end, result);
}

// Many rows ----------------------------------------------------------------------------------------------------------
// The weights of 32 outputs are put side by side, four inputs of each, and multiplied with twelve rows at a time.

struct Panel {
    const uint8_t* values;   // [inputs / 4, 32, 4]; of 4 bits, in the order of the inputs of Rounded
    const float* scales;     // [blocks, 32]
    const int32_t* zero_points;  // [blocks, 32]; not filled if all are the same
};

// Memory of the panels that a thread has at the same time.
struct PanelScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zero_points;
};

Panel pack(const Weights& weights, size_t output, PanelScratch& scratch) {
    const size_t blocks = weights.blocks(), bytes = weights.row_bytes();
    const size_t steps = round_up(bytes, CHUNK) / 4 * (8 / weights.bits);
    uint8_t* to = scratch.values.of(steps * STEP * PANEL);
    const size_t count = std::min(PANEL, weights.outputs - output);
    const __m512i half = _mm512_set1_epi8(15);
    // Read below in 32 places by turns, they would come slowly: memory is quickest in its own order.
    const char* const all = reinterpret_cast<const char*>(weights.values + output * bytes);
    for (size_t start = 0; start < count * bytes; start += CHUNK) _mm_prefetch(all + start, _MM_HINT_T1);
    for (size_t start = 0; start < bytes; start += CHUNK) {
        const __mmask64 mask = bytes - start >= CHUNK ? ~0ull : (1ull << (bytes - start)) - 1;
        for (size_t side = 0; side < 2; ++side) {
            __m512i rows[LANES];
            for (size_t i = 0; i < LANES; ++i) {
                const size_t one = side * LANES + i;
                const uint8_t* from = weights.values + (output + one) * bytes + start;
                rows[i] = one < count ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
            }
            transpose(rows);
            for (size_t i = 0; i < LANES; ++i) {
                uint8_t* step = to + (start / 4 + i) * (8 / weights.bits) * STEP * PANEL + side * CHUNK;
                if (weights.bits == 8) {
                    _mm512_store_si512(step, rows[i]);
                } else {
                    _mm512_store_si512(step, _mm512_and_si512(rows[i], half));
                    _mm512_store_si512(step + STEP * PANEL, _mm512_and_si512(_mm512_srli_epi16(rows[i], 4), half));
                }
            }
        }
    }
    float* own = scratch.scales.of(round_up(blocks, LANES) * PANEL);
    for (size_t block = 0; block < blocks; block += LANES)
        for (size_t side = 0; side < 2; ++side) {
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
    return {to, own, zero};
}

// What follows is written down as instructions: with intrinsics GCC 12 copies every sum in turn, and keeps totals twice.

// In each lane the same.
[[gnu::always_inline]] inline __m512i broadcast(const int32_t* value) {
    __m512i values;
    asm volatile("vpbroadcastd %1, %0" : "=v"(values) : "m"(*value));
    return values;
}

// Adds to each lane the product of its four weights and four inputs.
[[gnu::always_inline]] inline void add_products(__m512i& sums, __m512i weights, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*reinterpret_cast<const int32_t*>(x)));
}

// Adds sums of a block, each times its weights' scale and its inputs', to 16 totals. The sums are gone then.
[[gnu::always_inline]] inline void add_block(__m512i& sums, __m512 scales, const float* x_scale, float* totals) {
    __m512 product;
    asm("vmulps %4%{1to16%}, %3, %2\n\tvcvtdq2ps %0, %0\n\tvfmadd213ps %1, %2, %0\n\tvmovaps %0, %1"
        : "+v"(sums), "+m"(*reinterpret_cast<float(*)[LANES]>(totals)), "=&v"(product)
        : "v"(scales), "m"(*x_scale));
}

// The places I of some rows are constants from the start: only so does GCC keep the sums in registers.
template <bool SYMMETRIC, size_t... I>
void multiply_rows(
    std::index_sequence<I...>, const Panel& panel, const Rounded& tile, size_t block_size, float* result) {
    constexpr size_t ROWS = sizeof...(I);
    const uint8_t* weight = panel.values;
    const int8_t* x = tile.values;
    const float* x_scales = tile.scales;
    const int32_t* x_sums = tile.sums;
    for (size_t i = 0; i < ROWS * PANEL; i += LANES) _mm512_store_ps(result + i, _mm512_setzero_ps());
    for (size_t block = 0; block < tile.blocks; ++block, x_scales += TILE_ROWS, x_sums += TILE_ROWS) {
        __m512i left[ROWS], right[ROWS];
        if constexpr (SYMMETRIC) {
            ((left[I] = broadcast(x_sums + I), right[I] = broadcast(x_sums + I)), ...);
        } else {
            const int32_t* zero = panel.zero_points + block * PANEL;
            const __m512i left_zero = _mm512_load_si512(zero), right_zero = _mm512_load_si512(zero + LANES);
            ((left[I] = _mm512_mullo_epi32(_mm512_set1_epi32(x_sums[I]), left_zero)), ...);
            ((right[I] = _mm512_mullo_epi32(_mm512_set1_epi32(x_sums[I]), right_zero)), ...);
        }
        for (size_t step = 0; step < block_size / STEP; ++step, weight += STEP * PANEL, x += STEP * TILE_ROWS) {
            const __m512i left_weight = _mm512_load_si512(weight), right_weight = _mm512_load_si512(weight + CHUNK);
            (add_products(left[I], left_weight, x + I * STEP), ...);
            (add_products(right[I], right_weight, x + I * STEP), ...);
        }
        const __m512 left_scale = _mm512_load_ps(panel.scales + block * PANEL);
        const __m512 right_scale = _mm512_load_ps(panel.scales + block * PANEL + LANES);
        float* totals = result;
        asm("" : "+r"(totals));  // one address for all, not one for each
        (add_block(left[I], left_scale, x_scales + I, totals + I * PANEL), ...);
        (add_block(right[I], right_scale, x_scales + I, totals + I * PANEL + LANES), ...);
    }
}

using Tile = void (*)(const Panel&, const Rounded&, size_t, float*);

template <bool SYMMETRIC, size_t ROWS>
void multiply_tile(const Panel& panel, const Rounded& tile, size_t block_size, float* result) {
    multiply_rows<SYMMETRIC>(std::make_index_sequence<ROWS>(), panel, tile, block_size, result);
}

// For every number of rows, less one.
template <bool SYMMETRIC, size_t... I>
constexpr std::array<Tile, TILE_ROWS> tiles(std::index_sequence<I...>) {
    return {multiply_tile<SYMMETRIC, I + 1>...};
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
    alignas(64) float sums[TILE_ROWS * PANEL];
    for (size_t row = 0; row < rows; row += TILE_ROWS) {
        const size_t here = std::min(TILE_ROWS, rows - row);
        const Rounded tile = rounded.tile(row / TILE_ROWS, TILE_ROWS);
        for (size_t output = start; output < end; output += PANEL) {
            multiply[here - 1](panels[(output - start) / PANEL], tile, weights.block_size, sums);
            const size_t count = std::min(PANEL, end - output);
            for (size_t i = 0; i < here; ++i)
                for (size_t j = 0; j < count; j += LANES) {
                    const __mmask16 mask = first(count - j);
                    __m512 sum = _mm512_load_ps(sums + i * PANEL + j);
                    if (weights.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, weights.bias + output + j));
                    _mm512_mask_storeu_ps(result + (row + i) * weights.outputs + output + j, mask, sum);
                }
        }
    }
}

}  // namespace

void multiply(const float* x, size_t rows, const Weights& weights, float* result, const Parallel& parallel) {
    const Rounded rounded = round(x, rows, rows == 1 ? 1 : TILE_ROWS, weights, parallel);
    if (rows == 1) {
        // Few large parts: each begins a stream from memory anew. More threads than parts would find nothing to do, but
        // memory is shared by then.
        constexpr size_t TASKS = 16, LEAST = 64;
        const size_t together = std::max(LEAST, round_up(weights.outputs, TASKS) / TASKS);
        const Row row = order(rounded, weights);
        parallel((weights.outputs + together - 1) / together, [&](size_t group) {
            const size_t output = group * together, end = std::min(weights.outputs, output + together);
            if (weights.bits == 4) multiply_row<4>(row, weights, output, end, result);
            else multiply_row<8>(row, weights, output, end, result);
        });
        return;
    }
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
