// Attention of many rows: blocks of keys, online softmax (https://arxiv.org/abs/2205.14135).

#include <algorithm>
#include <array>
#include <utility>

#include "attention_kernels.h"
#include "bfloat16.h"
#include "simd.h"
#include "tier.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

// Both matmuls (scores, results) multiply tiles of rows with panels. Factors are words of four bytes: a float32, or two
// bfloat16 that are adjacent along the sum. Each word of a row is broadcast and multiplied with the lanes of a panel.
constexpr size_t TILE_ROWS = 8;                  // times 3 registers of lanes: 24 of the 32 registers are sums
constexpr size_t MAX_REGISTERS = 3;              // of a panel
constexpr size_t PANEL = MAX_REGISTERS * LANES;  // lanes of a panel: keys (scores) or channels (results)
constexpr size_t KEY_BLOCK = 288;                // keys per block: the scores of a tile stay in the L1 cache
constexpr size_t STRIDE = KEY_BLOCK + LANES;     // of a tile's rows; a power of two would conflict in the cache
constexpr float MIN_SCORE = -3e38f;              // maximum before the first key
static_assert(MAX_HEAD_WIDTH <= KEY_BLOCK && KEY_BLOCK % PANEL == 0);

constexpr size_t values_per_word(Precision precision) { return precision == Precision::BFLOAT16 ? 2 : 1; }

// Inline assembly: with intrinsics GCC 12 copies each accumulator.
[[gnu::always_inline]] inline __m512 broadcast(const uint32_t* word) {
    __m512 words;
    asm("vbroadcastss %1, %0" : "=v"(words) : "m"(*word));
    return words;
}

template <Precision PRECISION>
[[gnu::always_inline]] inline void multiply_add(__m512& sums, __m512 panel, __m512 words) {
    if constexpr (PRECISION == Precision::BFLOAT16) asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(panel), "v"(words));
    else asm("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(panel), "v"(words));
}

// totals += word * lanes, for one word of a row.
template <Precision PRECISION, size_t REGISTERS>
[[gnu::always_inline]] inline void multiply_add_row(
    __m512 (&totals)[REGISTERS], const __m512 (&lanes)[REGISTERS], const uint32_t* word) {
    const __m512 words = broadcast(word);
#pragma GCC unroll 3
    for (size_t i = 0; i < REGISTERS; ++i) multiply_add<PRECISION>(totals[i], lanes[i], words);
}

// sums = start + rows * panel, for rows [I, STRIDE]. Row stride of `start` is `start_stride`, of `sums` it is STRIDE.
// Row indices I are compile-time constants, so GCC keeps the accumulators in registers.
template <Precision PRECISION, size_t REGISTERS, size_t... I>
void matmul_rows(
    std::index_sequence<I...>, const uint32_t* rows, const float* panel, size_t steps, const float* start,
    size_t start_stride, float* sums) {
    __m512 totals[sizeof...(I)][REGISTERS];
#pragma GCC unroll 3
    for (size_t i = 0; i < REGISTERS; ++i)
        ((totals[I][i] = _mm512_loadu_ps(start + I * start_stride + i * LANES)), ...);
    for (size_t step = 0; step < steps; ++step, ++rows, panel += REGISTERS * LANES) {
        __m512 lanes[REGISTERS];
#pragma GCC unroll 3
        for (size_t i = 0; i < REGISTERS; ++i) lanes[i] = _mm512_load_ps(panel + i * LANES);
        (multiply_add_row<PRECISION>(totals[I], lanes, rows + I * STRIDE), ...);
    }
#pragma GCC unroll 3
    for (size_t i = 0; i < REGISTERS; ++i) (_mm512_store_ps(sums + I * STRIDE + i * LANES, totals[I][i]), ...);
}

using MatmulTile = void (*)(const uint32_t*, const float*, size_t, const float*, size_t, float*);

template <Precision PRECISION, size_t REGISTERS, size_t ROWS>
void matmul_tile(
    const uint32_t* rows, const float* panel, size_t steps, const float* start, size_t start_stride, float* sums) {
    matmul_rows<PRECISION, REGISTERS>(
        std::make_index_sequence<ROWS>(), rows, panel, steps, start, start_stride, sums);
}

// Index: number of rows - 1.
template <Precision PRECISION, size_t REGISTERS, size_t... I>
constexpr std::array<MatmulTile, TILE_ROWS> matmul_tiles(std::index_sequence<I...>) {
    return {matmul_tile<PRECISION, REGISTERS, I + 1>...};
}

// Converts a row to words, padded with zeros to a multiple of LANES words.
template <Precision PRECISION, typename T>
void pack_row(const T* row, size_t width, float* words) {
    for (size_t i = 0; i < width; i += values_per_word(PRECISION) * LANES, words += LANES) {
        const __m512 low = load(row + i, lane_mask(width - i));
        if constexpr (PRECISION == Precision::BFLOAT16) {
            const __m512 high = i + LANES < width ? load(row + i + LANES, lane_mask(width - i - LANES)) : __m512{};
            _mm512_storeu_si512(words, to_bfloat16(low, high));
        } else {
            _mm512_storeu_ps(words, low);
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
size_t panel_lanes(size_t index, size_t count) {
    return std::min(PANEL, round_up(count - index / PANEL * PANEL, LANES));
}

// Copies a 16 x 16 matrix of words, transposed.
void copy_transposed(const float* values, size_t stride, float* results, size_t result_stride) {
    __m512i rows[LANES];
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) rows[i] = _mm512_loadu_si512(values + i * stride);
    transpose(rows);
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) _mm512_store_si512(results + i * result_stride, rows[i]);
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
            const __mmask16 mask = lane_mask(head.width - i);
            float* to = panels + i / PANEL * PANEL * steps + step * panel_lanes(i, lanes) + i % PANEL;
            const __m512 low = load(row + i, mask);
            if constexpr (PRECISION == Precision::BFLOAT16) {
                const __m512 high = has_second ? load(row + head.stride + i, mask) : __m512{};
                _mm512_store_si512(to, bfloat16_pairs(low, high));
            } else {
                _mm512_store_ps(to, low);
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
    __m512 largest = _mm512_set1_ps(tile.largest[row]);
    for (size_t i = 0; i < visible; i += LANES)
        largest = _mm512_mask_max_ps(largest, lane_mask(visible - i), largest, _mm512_load_ps(scores + i));
    const float before = tile.largest[row];
    tile.largest[row] = _mm512_reduce_max_ps(largest);
    largest = _mm512_set1_ps(tile.largest[row]);
    const auto weights = [&](size_t i) __attribute__((always_inline)) {
        const __mmask16 mask = i < visible ? lane_mask(visible - i) : 0;
        return _mm512_maskz_mov_ps(mask, exp2(_mm512_sub_ps(_mm512_load_ps(scores + i), largest)));
    };
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += 2 * LANES) {
        const __m512 low = weights(i), high = weights(i + LANES);
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        if constexpr (PRECISION == Precision::BFLOAT16) {
            _mm512_store_si512(scores + i / 2, to_bfloat16(low, high));
        } else {
            _mm512_store_ps(scores + i, low);
            _mm512_store_ps(scores + i + LANES, high);
        }
    }
    const __m512 rescale = exp2(_mm512_sub_ps(_mm512_set1_ps(before), largest));
    tile.sums[row] = tile.sums[row] * _mm512_cvtss_f32(rescale) + _mm512_reduce_add_ps(sum);
    if (tile.largest[row] == before) return;
    float* results = tile.results + row * STRIDE;
    for (size_t i = 0; i < width; i += LANES)
        _mm512_store_ps(results + i, _mm512_mul_ps(_mm512_load_ps(results + i), rescale));
}

// Attention of the first `rows` rows of a tile to all keys that any of them sees.
template <Precision PRECISION>
void attend_tile(Tile& tile, size_t rows, const Panels& panels, const float* bias, size_t width) {
    constexpr auto ROWS = std::make_index_sequence<TILE_ROWS>();
    static constexpr std::array<std::array<MatmulTile, TILE_ROWS>, MAX_REGISTERS> MATMUL = {
        matmul_tiles<PRECISION, 1>(ROWS), matmul_tiles<PRECISION, 2>(ROWS), matmul_tiles<PRECISION, 3>(ROWS)};
    const auto words = [](const float* from) { return reinterpret_cast<const uint32_t*>(from); };
    const size_t visible = *std::max_element(tile.visible, tile.visible + rows);
    for (size_t start = 0; start < visible; start += KEY_BLOCK) {
        const size_t count = std::min(KEY_BLOCK, visible - start);
        for (size_t key = 0; key < count; key += PANEL)
            MATMUL[panel_lanes(start + key, panels.sizes.count) / LANES - 1][rows - 1](
                words(tile.queries), panels.keys + (start + key) * round_up(panels.sizes.depth, LANES), panels.sizes.depth,
                bias + start + key, 0, tile.scores + key);
        for (size_t row = 0; row < rows; ++row) {
            const size_t here = std::min(count, tile.visible[row] - std::min(tile.visible[row], start));
            softmax_block<PRECISION>(tile, row, here, count, width);
        }
        const size_t steps = (count + values_per_word(PRECISION) - 1) / values_per_word(PRECISION);
        const size_t step = start / values_per_word(PRECISION);
        for (size_t i = 0; i < width; i += PANEL) {
            const size_t lanes = panel_lanes(i, width);
            MATMUL[lanes / LANES - 1][rows - 1](
                words(tile.scores), panels.values + i * panels.sizes.steps + step * lanes, steps, tile.results + i, STRIDE,
                tile.results + i);
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
void attend(const KvHead<T>& head, const void* packed, const QueryRows& rows, size_t first, size_t end) {
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
            const __m512 inverse = _mm512_set1_ps(1 / tile.sums[i]);
            for (size_t j = 0; j < head.width; j += LANES) {
                const __mmask16 mask = lane_mask(head.width - j);
                __m512 value = _mm512_mul_ps(_mm512_load_ps(tile.results + i * STRIDE + j), inverse);
                if (head.value_scales) value = _mm512_mul_ps(value, load(head.value_scales + j, mask));
                _mm512_mask_storeu_ps(result + j, mask, value);
            }
        }
    }
}

}  // namespace

template <typename T>
const FlashKernel<T>& flash_kernel(Precision precision) {
    static constexpr FlashKernel<T>
        FLOATS = {packed_bytes<Precision::FLOAT32>, pack<Precision::FLOAT32, T>, attend<Precision::FLOAT32, T>},
        PAIRS = {packed_bytes<Precision::BFLOAT16>, pack<Precision::BFLOAT16, T>, attend<Precision::BFLOAT16, T>};
    if (precision == Precision::FLOAT32) return FLOATS;
    return tier() == Tier::AMX ? amx_kernel<T>() : PAIRS;
}

template const FlashKernel<float>& flash_kernel(Precision);
template const FlashKernel<int8_t>& flash_kernel(Precision);

}  // namespace fusion_edge
