#include <algorithm>
#include <array>
#include <utility>

#include "attention_rows.h"
#include "lanes.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

// Factors come in words of four bytes, a float or two of bfloat16 that follow each other along the sum. Products are of
// rows of words, each broadcast, with panels [words along the sum, lanes].
constexpr size_t TILE_ROWS = 8;                   // with three registers of lanes: 24 of the 32 registers are sums
constexpr size_t MOST_REGISTERS = 3;              // of a panel's lanes
constexpr size_t PANEL = MOST_REGISTERS * LANES;  // lanes of a panel: keys of scores, channels of results
constexpr size_t KEYS = 288;                      // of a block: scores of a tile stay in the first-level cache
constexpr size_t STRIDE = KEYS + LANES;           // of a tile's rows. A power of two would share few places of the cache.
constexpr float LOWEST = -3e38f;                  // a maximum of nothing
static_assert(LARGEST_HEAD <= KEYS && KEYS % PANEL == 0);

constexpr size_t per_word(Factors factors) { return factors == Factors::BFLOAT16 ? 2 : 1; }

// The intrinsics make GCC 12 copy every sum in turn.
[[gnu::always_inline]] inline __m512 broadcast(const uint32_t* word) {
    __m512 words;
    asm("vbroadcastss %1, %0" : "=v"(words) : "m"(*word));
    return words;
}

template <Factors FACTORS>
[[gnu::always_inline]] inline void add_products(__m512& sums, __m512 panel, __m512 words) {
    if constexpr (FACTORS == Factors::BFLOAT16) asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(panel), "v"(words));
    else asm("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(panel), "v"(words));
}

// Adds to the totals of a row what one of its words gives.
template <Factors FACTORS, size_t REGISTERS>
[[gnu::always_inline]] inline void add_row(
    __m512 (&totals)[REGISTERS], const __m512 (&lanes)[REGISTERS], const uint32_t* word) {
    const __m512 words = broadcast(word);
#pragma GCC unroll 3
    for (size_t i = 0; i < REGISTERS; ++i) add_products<FACTORS>(totals[i], lanes[i], words);
}

// 32 floats in bfloat16, rounded to nearest even.
inline __m512i round(__m512 low, __m512 high) {
    __m512i rounded;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(low), "v"(high));
    return rounded;
}

// sums = start + rows * panel, for rows [I, STRIDE]. Rows of `start` are `start_stride` apart, those of `sums` STRIDE.
// The places I are constants from the start: only so does GCC keep the sums in registers.
template <Factors FACTORS, size_t REGISTERS, size_t... I>
void multiply_rows(
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
        (add_row<FACTORS>(totals[I], lanes, rows + I * STRIDE), ...);
    }
#pragma GCC unroll 3
    for (size_t i = 0; i < REGISTERS; ++i) (_mm512_store_ps(sums + I * STRIDE + i * LANES, totals[I][i]), ...);
}

using Multiply = void (*)(const uint32_t*, const float*, size_t, const float*, size_t, float*);

template <Factors FACTORS, size_t REGISTERS, size_t ROWS>
void multiply_tile(
    const uint32_t* rows, const float* panel, size_t steps, const float* start, size_t start_stride, float* sums) {
    multiply_rows<FACTORS, REGISTERS>(
        std::make_index_sequence<ROWS>(), rows, panel, steps, start, start_stride, sums);
}

// For every number of rows, less one.
template <Factors FACTORS, size_t REGISTERS, size_t... I>
constexpr std::array<Multiply, TILE_ROWS> tiles(std::index_sequence<I...>) {
    return {multiply_tile<FACTORS, REGISTERS, I + 1>...};
}

// A row of values in words, up to a multiple of LANES words; zero behind the last value.
template <Factors FACTORS, typename T>
void write_words(const T* row, size_t width, float* words) {
    for (size_t i = 0; i < width; i += per_word(FACTORS) * LANES, words += LANES) {
        const __m512 low = load(row + i, first(width - i));
        if constexpr (FACTORS == Factors::BFLOAT16) {
            const __m512 high = i + LANES < width ? load(row + i + LANES, first(width - i - LANES)) : __m512{};
            _mm512_storeu_si512(words, round(low, high));
        } else {
            _mm512_storeu_ps(words, low);
        }
    }
}

// Keys and values of one head as panels.
struct Panels {
    const float* keys;    // [count / PANEL, rounded up; depth, rounded up to LANES; lanes of the panel]
    const float* values;  // [width / PANEL, rounded up; steps; lanes of the panel]
    size_t count, depth, steps;
};

// Lanes of the panel that holds a place, one of so many: the last has fewer registers if they are enough.
size_t panel_lanes(size_t place, size_t count) {
    return std::min(PANEL, round_up(count - place / PANEL * PANEL, LANES));
}

// Lane i of result j is lane j of value i.
void copy_transposed(const float* values, size_t stride, float* results, size_t result_stride) {
    __m512i rows[LANES];
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) rows[i] = _mm512_loadu_si512(values + i * stride);
    transpose(rows);
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) _mm512_store_si512(results + i * result_stride, rows[i]);
}

template <Factors FACTORS, typename T>
const float* pack_keys(const Head<T>& head, size_t depth) {
    static thread_local Scratch<float> memory;
    const size_t words_of_key = round_up(depth, LANES);
    float* const panels = memory.of(round_up(head.count, LANES) * words_of_key);
    alignas(64) float words[LANES * STRIDE] = {};
    for (size_t key = 0; key < head.count; key += LANES) {
        for (size_t i = 0; i < std::min(LANES, head.count - key); ++i)
            write_words<FACTORS>(head.keys + (key + i) * head.stride, head.width, words + i * STRIDE);
        float* to = panels + key / PANEL * PANEL * words_of_key + key % PANEL;
        const size_t stride = panel_lanes(key, head.count);
        for (size_t i = 0; i < depth; i += LANES) copy_transposed(words + i, STRIDE, to + i * stride, stride);
    }
    return panels;
}

template <Factors FACTORS, typename T>
const float* pack_values(const Head<T>& head, size_t steps) {
    static thread_local Scratch<float> memory;
    const size_t lanes = round_up(head.width, LANES);
    float* const panels = memory.of(lanes * steps);
    const __m512i pairs = _mm512_or_si512(  // places 0, 16, 1, 17 ... of 16 bits
        _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(
                _mm256_setr_epi16(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)),
            16));
    for (size_t step = 0; step < steps; ++step) {
        const T* row = head.values + step * per_word(FACTORS) * head.stride;
        const bool has_second = step * per_word(FACTORS) + 1 < head.count;
        for (size_t i = 0; i < lanes; i += LANES) {
            const __mmask16 mask = first(head.width - i);
            float* to = panels + i / PANEL * PANEL * steps + step * panel_lanes(i, lanes) + i % PANEL;
            const __m512 low = load(row + i, mask);
            if constexpr (FACTORS == Factors::BFLOAT16) {
                const __m512 high = has_second ? load(row + head.stride + i, mask) : __m512{};
                _mm512_store_si512(to, _mm512_permutexvar_epi16(pairs, round(low, high)));
            } else {
                _mm512_store_ps(to, low);
            }
        }
    }
    return panels;
}

// A tile's rows while they go from block to block of keys.
struct alignas(64) Tile {
    float queries[TILE_ROWS * STRIDE];  // words
    float scores[TILE_ROWS * STRIDE];   // of a block; then what softmax makes of them, in words
    float results[TILE_ROWS * STRIDE];  // sums of values, not yet divided by the weights' sums
    float largest[TILE_ROWS], sums[TILE_ROWS];
    size_t visible[TILE_ROWS];
};

// Makes weights of a row's scores with a block of `count` keys, of which it sees the first `visible`.
template <Factors FACTORS>
void weigh(Tile& tile, size_t row, size_t visible, size_t count, size_t width) {
    float* scores = tile.scores + row * STRIDE;
    __m512 largest = _mm512_set1_ps(tile.largest[row]);
    for (size_t i = 0; i < visible; i += LANES)
        largest = _mm512_mask_max_ps(largest, first(visible - i), largest, _mm512_load_ps(scores + i));
    const float before = tile.largest[row];
    tile.largest[row] = _mm512_reduce_max_ps(largest);
    largest = _mm512_set1_ps(tile.largest[row]);
    const auto weights = [&](size_t i) __attribute__((always_inline)) {
        const __mmask16 mask = i < visible ? first(visible - i) : 0;
        return _mm512_maskz_mov_ps(mask, exp2(_mm512_sub_ps(_mm512_load_ps(scores + i), largest)));
    };
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += 2 * LANES) {
        const __m512 low = weights(i), high = weights(i + LANES);
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        if constexpr (FACTORS == Factors::BFLOAT16) {
            _mm512_store_si512(scores + i / 2, round(low, high));
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

// The first `rows` rows of a tile with all keys that one of them sees.
template <Factors FACTORS>
void attend_tile(Tile& tile, size_t rows, const Panels& panels, const float* bias, size_t width) {
    constexpr auto ROWS = std::make_index_sequence<TILE_ROWS>();
    static constexpr std::array<std::array<Multiply, TILE_ROWS>, MOST_REGISTERS> MULTIPLY = {
        tiles<FACTORS, 1>(ROWS), tiles<FACTORS, 2>(ROWS), tiles<FACTORS, 3>(ROWS)};
    const auto words = [](const float* from) { return reinterpret_cast<const uint32_t*>(from); };
    const size_t visible = *std::max_element(tile.visible, tile.visible + rows);
    for (size_t start = 0; start < visible; start += KEYS) {
        const size_t count = std::min(KEYS, visible - start);
        for (size_t key = 0; key < count; key += PANEL)
            MULTIPLY[panel_lanes(start + key, panels.count) / LANES - 1][rows - 1](
                words(tile.queries), panels.keys + (start + key) * round_up(panels.depth, LANES), panels.depth,
                bias + start + key, 0, tile.scores + key);
        for (size_t row = 0; row < rows; ++row) {
            const size_t here = std::min(count, tile.visible[row] - std::min(tile.visible[row], start));
            weigh<FACTORS>(tile, row, here, count, width);
        }
        const size_t steps = (count + per_word(FACTORS) - 1) / per_word(FACTORS);
        const size_t step = start / per_word(FACTORS);
        for (size_t i = 0; i < width; i += PANEL) {
            const size_t lanes = panel_lanes(i, width);
            MULTIPLY[lanes / LANES - 1][rows - 1](
                words(tile.scores), panels.values + i * panels.steps + step * lanes, steps, tile.results + i, STRIDE,
                tile.results + i);
        }
    }
}

template <Factors FACTORS, typename T>
void attend(const Head<T>& head, const Rows& rows) {
    static thread_local Scratch<Tile> scratch;
    static thread_local Scratch<float> biases;
    Panels panels{nullptr, nullptr, head.count, 0, 0};
    panels.depth = (head.width + per_word(FACTORS) - 1) / per_word(FACTORS);
    panels.steps = (head.count + per_word(FACTORS) - 1) / per_word(FACTORS);
    panels.keys = pack_keys<FACTORS>(head, panels.depth);
    panels.values = pack_values<FACTORS>(head, panels.steps);
    float* bias = biases.of(round_up(head.count, PANEL));
    std::fill(bias, bias + round_up(head.count, PANEL), 0.0f);
    if (head.bias) std::copy(head.bias, head.bias + head.count, bias);
    Tile& tile = *scratch.of(1);
    alignas(64) float query[LARGEST_HEAD];
    for (size_t row = 0; row < rows.count; row += TILE_ROWS) {
        const size_t here = std::min(TILE_ROWS, rows.count - row);
        std::fill(tile.results, tile.results + here * STRIDE, 0.0f);
        std::fill(tile.largest, tile.largest + here, LOWEST);
        std::fill(tile.sums, tile.sums + here, 0.0f);
        for (size_t i = 0; i < here; ++i) {
            rows.query(row + i, query);
            write_words<FACTORS>(query, head.width, tile.queries + i * STRIDE);
            tile.visible[i] = rows.visible(row + i);
        }
        attend_tile<FACTORS>(tile, here, panels, bias, head.width);
        for (size_t i = 0; i < here; ++i) {
            float* result = rows.result(row + i);
            const __m512 inverse = _mm512_set1_ps(1 / tile.sums[i]);
            for (size_t j = 0; j < head.width; j += LANES) {
                const __mmask16 mask = first(head.width - j);
                __m512 value = _mm512_mul_ps(_mm512_load_ps(tile.results + i * STRIDE + j), inverse);
                if (head.value_scales) value = _mm512_mul_ps(value, load(head.value_scales + j, mask));
                _mm512_mask_storeu_ps(result + j, mask, value);
            }
        }
    }
}

}  // namespace

template <typename T>
void attend_in_tiles(const Head<T>& head, const Rows& rows, Factors factors) {
    if (factors == Factors::BFLOAT16) attend<Factors::BFLOAT16>(head, rows);
    else attend<Factors::FLOAT32>(head, rows);
}

template void attend_in_tiles(const Head<float>&, const Rows&, Factors);
template void attend_in_tiles(const Head<int8_t>&, const Rows&, Factors);

}  // namespace fusion_edge
