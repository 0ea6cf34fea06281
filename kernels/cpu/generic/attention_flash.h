// Attention of many rows: blocks of keys, online softmax (https://arxiv.org/abs/2205.14135).

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "attention_kernels.h"
#include "gemm_tile.h"

namespace fusion_edge::SIMD {

// Both matmuls (scores, results) multiply tiles of rows with panels. Factors are words of four bytes: a float32, or two
// bfloat16 that are adjacent along the sum. Each word of a row is broadcast and multiplied with the lanes of a panel:
// keys (scores) or channels (results).
constexpr size_t KEY_BLOCK = 288;             // keys per block: the scores of a tile stay in the L1 cache
constexpr size_t STRIDE = KEY_BLOCK + LANES;  // of a tile's rows; a power of two would conflict in the cache
static_assert(MAX_HEAD_WIDTH <= KEY_BLOCK && KEY_BLOCK % PANEL == 0);

constexpr size_t values_per_word(Precision precision) { return precision == Precision::BFLOAT16 ? 2 : 1; }

// sums = start + rows * panel, for rows [I, STRIDE]. Row stride of `start` is `start_stride`, of `sums` it is STRIDE.
// Row indices I are compile-time constants, so GCC keeps the accumulators in registers.
template <Precision PRECISION, size_t WIDTH, size_t... I>
void multiply_rows(
    std::index_sequence<I...>, const uint32_t* rows, const float* panel, size_t steps, const float* start,
    size_t start_stride, float* sums) {
    Floats totals[sizeof...(I)][WIDTH];
#pragma GCC unroll 3
    for (size_t i = 0; i < WIDTH; ++i) ((totals[I][i] = load(start + I * start_stride + i * LANES)), ...);
    for (size_t step = 0; step < steps; ++step, ++rows, panel += WIDTH * LANES) {
        Floats lanes[WIDTH];
#pragma GCC unroll 3
        for (size_t i = 0; i < WIDTH; ++i) lanes[i] = load(panel + i * LANES);
        (multiply_add_row<PRECISION == Precision::BFLOAT16>(totals[I], lanes, WIDTH, rows + I * STRIDE), ...);
    }
#pragma GCC unroll 3
    for (size_t i = 0; i < WIDTH; ++i) (store(sums + I * STRIDE + i * LANES, totals[I][i]), ...);
}

using MultiplyTile = void (*)(const uint32_t*, const float*, size_t, const float*, size_t, float*);

template <Precision PRECISION, size_t WIDTH, size_t ROWS>
void multiply_tile(
    const uint32_t* rows, const float* panel, size_t steps, const float* start, size_t start_stride, float* sums) {
    multiply_rows<PRECISION, WIDTH>(std::make_index_sequence<ROWS>(), rows, panel, steps, start, start_stride, sums);
}

// Index: number of rows - 1.
using MultiplyTiles = std::array<MultiplyTile, TILE_ROWS>;

template <Precision PRECISION, size_t WIDTH, size_t... I>
constexpr MultiplyTiles multiply_tiles(std::index_sequence<I...>) {
    return {multiply_tile<PRECISION, WIDTH, I + 1>...};
}

// Index: number of registers of the panel - 1.
template <Precision PRECISION, size_t... I>
constexpr std::array<MultiplyTiles, REGISTERS> multiply_panels(std::index_sequence<I...>) {
    return {multiply_tiles<PRECISION, I + 1>(std::make_index_sequence<TILE_ROWS>())...};
}

// Converts a row to words, padded with zeros to a multiple of LANES words.
template <Precision PRECISION, typename T>
void pack_row(const T* row, size_t width, float* words) {
    for (size_t i = 0; i < width; i += values_per_word(PRECISION) * LANES, words += LANES) {
        const Floats low = load(row + i, width - i);
        if constexpr (PRECISION == Precision::BFLOAT16) {
            const Floats high = i + LANES < width ? load(row + i + LANES, width - i - LANES) : broadcast(0);
            store(words, as_floats(to_bfloat16(low, high)));
        } else {
            store(words, low);
        }
    }
}

// Sizes of a head's keys and values as panels.
struct PanelSizes {
    size_t count, depth, steps;  // keys; words of a key; words of `count` values
    size_t key_words;            // of all keys; values follow

    PanelSizes(size_t count, size_t width, Precision precision)
        : count(count),
          depth((width + values_per_word(precision) - 1) / values_per_word(precision)),
          steps((count + values_per_word(precision) - 1) / values_per_word(precision)),
          key_words(round_up(count, LANES) * round_up(depth, LANES)) {}
};

// Keys and values of one head as panels.
struct Panels {
    const float* keys;    // [ceil(count / PANEL), depth rounded up to LANES, lanes of the panel]
    const float* values;  // [ceil(width / PANEL), steps, lanes of the panel]
    PanelSizes sizes;
};

// Number of lanes of the panel that holds `index`, of `count`: the last panel may have fewer registers.
inline size_t panel_lanes(size_t index, size_t count) {
    return std::min(PANEL, round_up(count - index / PANEL * PANEL, LANES));
}

// Copies a 16 x 16 matrix of words, transposed.
inline void copy_transposed(const float* values, size_t stride, float* results, size_t result_stride) {
    Ints rows[LANES];
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) rows[i] = as_ints(load(values + i * stride));
    transpose(rows);
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) store(results + i * result_stride, as_floats(rows[i]));
}

template <Precision PRECISION, typename T>
void pack_keys(const KvHead<T>& head, size_t depth, float* panels) {
    const size_t words_of_key = round_up(depth, LANES);
    alignas(64) float words[LANES * STRIDE] = {};
    for (size_t key = 0; key < head.count; key += LANES) {
        for (size_t i = 0; i < std::min(LANES, head.count - key); ++i)
            pack_row<PRECISION>(head.keys + (key + i) * head.stride, head.width, words + i * STRIDE);
        float* to = panels + key / PANEL * PANEL * words_of_key + key % PANEL;
        const size_t stride = panel_lanes(key, head.count);
        for (size_t i = 0; i < depth; i += LANES) copy_transposed(words + i, STRIDE, to + i * stride, stride);
    }
}

template <Precision PRECISION, typename T>
void pack_values(const KvHead<T>& head, size_t steps, float* panels) {
    const size_t lanes = round_up(head.width, LANES);
    for (size_t step = 0; step < steps; ++step) {
        const T* row = head.values + step * values_per_word(PRECISION) * head.stride;
        const bool has_second = step * values_per_word(PRECISION) + 1 < head.count;
        for (size_t i = 0; i < lanes; i += LANES) {
            const size_t count = head.width - i;
            float* to = panels + i / PANEL * PANEL * steps + step * panel_lanes(i, lanes) + i % PANEL;
            const Floats low = load(row + i, count);
            if constexpr (PRECISION == Precision::BFLOAT16) {
                const Floats high = has_second ? load(row + head.stride + i, count) : broadcast(0);
                store(to, as_floats(to_bfloat16_pairs(low, high)));
            } else {
                store(to, low);
            }
        }
    }
}

// State of a tile of query rows between blocks of keys.
struct alignas(64) Tile {
    float queries[TILE_ROWS * STRIDE];  // words
    float scores[TILE_ROWS * STRIDE];   // of a block; after softmax_block their weights, in words
    float results[TILE_ROWS * STRIDE];  // weighted sums of values, not divided by `sums`
    float largest[TILE_ROWS], sums[TILE_ROWS];
    size_t visible[TILE_ROWS];
};

// Replaces a row's scores in a block of `count` keys, of which it sees the first `visible`, by softmax weights relative
// to the running maximum, and rescales earlier results.
template <Precision PRECISION>
void softmax_block(Tile& tile, size_t row, size_t visible, size_t count, size_t width) {
    float* scores = tile.scores + row * STRIDE;
    const float before = tile.largest[row];
    Floats largest = broadcast(before);
    for (size_t i = 0; i < visible; i += LANES) largest = max_first(largest, load(scores + i), visible - i);
    tile.largest[row] = reduce_max(largest);
    largest = broadcast(tile.largest[row]);
    const auto weights = [&](size_t i) __attribute__((always_inline)) {
        return keep_first(exp2(sub(load(scores + i), largest)), i < visible ? visible - i : 0);
    };
    Floats sum = broadcast(0);
    for (size_t i = 0; i < count; i += 2 * LANES) {
        const Floats low = weights(i), high = weights(i + LANES);
        sum = add(sum, add(low, high));
        if constexpr (PRECISION == Precision::BFLOAT16) {
            store(scores + i / 2, as_floats(to_bfloat16(low, high)));
        } else {
            store(scores + i, low);
            store(scores + i + LANES, high);
        }
    }
    alignas(64) float rescale[LANES];
    store(rescale, exp2(sub(broadcast(before), largest)));
    tile.sums[row] = tile.sums[row] * rescale[0] + reduce_add(sum);
    if (tile.largest[row] == before) return;
    float* results = tile.results + row * STRIDE;
    for (size_t i = 0; i < width; i += LANES) store(results + i, mul(load(results + i), broadcast(rescale[0])));
}

// Attention of the first `rows` rows of a tile to all keys that any of them sees.
template <Precision PRECISION>
void attend_tile(Tile& tile, size_t rows, const Panels& panels, const float* bias, size_t width) {
    static constexpr auto MATMUL = multiply_panels<PRECISION>(std::make_index_sequence<REGISTERS>());
    const auto words = [](const float* from) { return reinterpret_cast<const uint32_t*>(from); };
    const size_t visible = *std::max_element(tile.visible, tile.visible + rows);
    for (size_t start = 0; start < visible; start += KEY_BLOCK) {
        const size_t count = std::min(KEY_BLOCK, visible - start);
        for (size_t key = 0; key < count; key += PANEL)
            MATMUL[panel_lanes(start + key, panels.sizes.count) / LANES - 1][rows - 1](
                words(tile.queries), panels.keys + (start + key) * round_up(panels.sizes.depth, LANES),
                panels.sizes.depth, bias + start + key, 0, tile.scores + key);
        for (size_t row = 0; row < rows; ++row) {
            const size_t here = std::min(count, tile.visible[row] - std::min(tile.visible[row], start));
            softmax_block<PRECISION>(tile, row, here, count, width);
        }
        const size_t steps = (count + values_per_word(PRECISION) - 1) / values_per_word(PRECISION);
        const size_t step = start / values_per_word(PRECISION);
        for (size_t i = 0; i < width; i += PANEL) {
            const size_t lanes = panel_lanes(i, width);
            MATMUL[lanes / LANES - 1][rows - 1](
                words(tile.scores), panels.values + i * panels.sizes.steps + step * lanes, steps, tile.results + i,
                STRIDE, tile.results + i);
        }
    }
}

template <Precision PRECISION>
size_t packed_bytes(size_t keys, size_t width) {
    const PanelSizes sizes(keys, width, PRECISION);
    return (sizes.key_words + round_up(width, LANES) * sizes.steps) * sizeof(float);
}

template <Precision PRECISION, typename T>
void pack(const KvHead<T>& head, void* packed) {
    const PanelSizes sizes(head.count, head.width, PRECISION);
    float* const panels = static_cast<float*>(packed);
    pack_keys<PRECISION>(head, sizes.depth, panels);
    pack_values<PRECISION>(head, sizes.steps, panels + sizes.key_words);
}

template <Precision PRECISION, typename T>
void attend_rows(const KvHead<T>& head, const void* packed, const QueryRows& rows, size_t first, size_t end) {
    static thread_local Scratch<Tile> scratch;
    static thread_local Scratch<float> biases;
    const PanelSizes sizes(head.count, head.width, PRECISION);
    const float* const keys = static_cast<const float*>(packed);
    const Panels panels{keys, keys + sizes.key_words, sizes};
    float* bias = biases.of(round_up(head.count, PANEL));
    std::fill(bias, bias + round_up(head.count, PANEL), 0.0f);
    if (head.bias) std::copy(head.bias, head.bias + head.count, bias);
    Tile& tile = *scratch.of(1);
    alignas(64) float query[MAX_HEAD_WIDTH];
    for (size_t row = first; row < end; row += TILE_ROWS) {
        const size_t here = std::min(TILE_ROWS, end - row);
        std::fill(tile.results, tile.results + here * STRIDE, 0.0f);
        std::fill(tile.largest, tile.largest + here, MIN_SCORE);
        std::fill(tile.sums, tile.sums + here, 0.0f);
        for (size_t i = 0; i < here; ++i) {
            rows.query(row + i, query);
            pack_row<PRECISION>(query, head.width, tile.queries + i * STRIDE);
            tile.visible[i] = rows.visible(row + i);
        }
        attend_tile<PRECISION>(tile, here, panels, bias, head.width);
        for (size_t i = 0; i < here; ++i) {
            float* result = rows.result(row + i);
            const Floats inverse = broadcast(1 / tile.sums[i]);
            for (size_t j = 0; j < head.width; j += LANES) {
                const size_t count = head.width - j;
                Floats value = mul(load(tile.results + i * STRIDE + j), inverse);
                if (head.value_scales) value = mul(value, load(head.value_scales + j, count));
                store(result + j, value, count);
            }
        }
    }
}

template <Precision PRECISION, typename T>
inline constexpr FlashKernel<T> TILE_FLASH = {packed_bytes<PRECISION>, pack<PRECISION, T>, attend_rows<PRECISION, T>};

struct TileFlash {
    // Computes in float32 where the processor lacks bfloat16.
    template <typename T>
    static const FlashKernel<T>& kernel(Precision precision) {
        if constexpr (HAS_BFLOAT16)
            if (precision == Precision::BFLOAT16 && has_bfloat16()) return TILE_FLASH<Precision::BFLOAT16, T>;
        return TILE_FLASH<Precision::FLOAT32, T>;
    }
};

}  // namespace fusion_edge::SIMD
