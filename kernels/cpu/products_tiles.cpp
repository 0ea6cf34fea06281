// Many rows: the weights of 48 outputs are put side by side, four inputs of each, and multiplied with eight rows at a
// time. An instruction that brings a row's inputs to all lanes serves three products: where each product reads them
// itself (twelve rows by 32 outputs), loads are what takes the time.

#include <algorithm>
#include <array>
#include <utility>

#include "activation_lanes.h"
#include "products_parts.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t REGISTERS = 3;              // of outputs
constexpr size_t PANEL = REGISTERS * LANES;  // outputs of a tile
constexpr size_t MOST_PANELS = 8;            // that a thread multiplies a tile of rows with in turn

// What has a zero point: inputs, and weights are signed; or weights, each of their blocks its own or all the same, and
// inputs are signed.
enum class Zero { OF_INPUTS, OF_ALL_WEIGHTS, OF_EACH_BLOCK };

struct Panel {
    const uint8_t* values;       // [inputs / 4, PANEL, 4]; of 4 bits, in the order of the inputs of Rounded
    const float* scales;         // [blocks, PANEL]
    // [blocks, PANEL]: of weights, not filled if all have the same; or minus that of inputs, times the weights' sum.
    const int32_t* zero_points;
    const float* bias;           // [PANEL]
};

// Memory of the panels that a thread has at the same time.
struct PanelScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zero_points;
    alignas(64) float bias[PANEL];
};

// Values of some outputs, and the sum of each one's if the rounding of inputs was given.
void pack_values(const Weights& weights, size_t output, size_t count, uint8_t* to, int32_t* sums) {
    const size_t bytes = weights.row_bytes();
    const __m512i one_each = _mm512_set1_epi8(1);
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
    for (size_t i = 0; weights.given && i < PANEL; ++i) sums[i] = _mm512_reduce_add_epi32(totals[i]);
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
        if (weights.given) zero[i] = -weights.given->zero_point * sums[i];
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

// Adds to each lane the product of its four weights and four inputs, of which one are unsigned.
template <Zero ZERO>
[[gnu::always_inline]] inline void add_products(Sums& sums, const Sums& weights, const int8_t* x) {
    const int32_t& four = *reinterpret_cast<const int32_t*>(x);
    __m512i inputs;
    if constexpr (ZERO == Zero::OF_INPUTS)
        asm("vpbroadcastd %7, %3\n\tvpdpbusd %4, %3, %0\n\tvpdpbusd %5, %3, %1\n\tvpdpbusd %6, %3, %2"
            : "+&v"(sums[0]), "+&v"(sums[1]), "+&v"(sums[2]), "=&v"(inputs)
            : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(four));
    else
        asm("vpbroadcastd %7, %3\n\tvpdpbusd %3, %4, %0\n\tvpdpbusd %3, %5, %1\n\tvpdpbusd %3, %6, %2"
            : "+&v"(sums[0]), "+&v"(sums[1]), "+&v"(sums[2]), "=&v"(inputs)
            : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(four));
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
template <Zero ZERO, size_t... I>
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
        if constexpr (ZERO == Zero::OF_INPUTS) {
            const int32_t* zero = panel.zero_points;  // of the one block
            ((sums[I][0] = _mm512_load_si512(zero), sums[I][1] = _mm512_load_si512(zero + LANES),
              sums[I][2] = _mm512_load_si512(zero + 2 * LANES)), ...);
        } else if constexpr (ZERO == Zero::OF_ALL_WEIGHTS) {
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
            (add_products<ZERO>(sums[I], weights, x + I * STEP), ...);
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

template <Zero ZERO, size_t ROWS>
void multiply_tile(const Panel& panel, const Rounded& tile, size_t block_size, Next next, float* result) {
    multiply_rows<ZERO>(std::make_index_sequence<ROWS>(), panel, tile, block_size, next, result);
}

// For every number of rows, less one.
template <Zero ZERO, size_t... I>
constexpr std::array<Tile, TILE_ROWS> tiles(std::index_sequence<I...>) {
    return {multiply_tile<ZERO, I + 1>...};
}

const std::array<Tile, TILE_ROWS>& tiles(const Weights& weights) {
    constexpr auto ROWS = std::make_index_sequence<TILE_ROWS>();
    static constexpr auto OF_INPUTS = tiles<Zero::OF_INPUTS>(ROWS), OF_ALL = tiles<Zero::OF_ALL_WEIGHTS>(ROWS),
                          OF_EACH = tiles<Zero::OF_EACH_BLOCK>(ROWS);
    return weights.given ? OF_INPUTS : weights.zero_points ? OF_EACH : OF_ALL;
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

// Where sums of tiles go.
class Target {
  public:
    virtual ~Target() = default;
    // Sums [rows, PANEL] of rows from `row` on, with outputs from `output` on, whose bias is given.
    virtual void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const = 0;
    // What is about to be written.
    virtual void fetch(size_t row, size_t rows, size_t output) const = 0;
};

// Floats [rows, outputs].
class Floats final : public Target {
  public:
    Floats(float* result, size_t rows, size_t outputs) : result_(result), outputs_(outputs) {
        constexpr size_t CACHED = 16 << 20;  // bytes of results
        streams_ = rows * outputs * sizeof(float) > CACHED && outputs % LANES == 0 &&
                   reinterpret_cast<uintptr_t>(result) % CHUNK == 0;
    }

    void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const override {
        const size_t count = std::min(PANEL, outputs_ - output);
        float* const to = result_ + row * outputs_ + output;
        if (streams_) write_tile<true>(sums, bias, rows, count, outputs_, to);
        else write_tile<false>(sums, bias, rows, count, outputs_, to);
    }

    void fetch(size_t row, size_t rows, size_t output) const override {
        for (size_t i = 0; i < rows && !streams_; ++i)
            for (size_t j = 0; j < PANEL; j += LANES) __builtin_prefetch(result_ + (row + i) * outputs_ + output + j, 1);
    }

  private:
    float* result_;
    size_t outputs_;
    bool streams_;
};

// Inputs of the next product: the GELU of the results, rounded.
class RoundedGelu final : public Target {
  public:
    RoundedGelu(const Rounded& next, const GivenRounding& given) : next_(next), rounder_(given) {}

    void write(const float* sums, const float* bias, size_t row, size_t, size_t output) const override {
        int8_t* to = next_.tile(row / TILE_ROWS, TILE_ROWS).values + output * TILE_ROWS;
        for (size_t j = 0; j < PANEL; j += LANES, to += LANES * TILE_ROWS) {
            const __m512i low = four_rows(sums + j, bias + j), high = four_rows(sums + 4 * PANEL + j, bias + j);
            const __m512i start = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            const __m512i end = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            _mm512_store_si512(to, _mm512_permutex2var_epi64(low, start, high));
            _mm512_store_si512(to + CHUNK, _mm512_permutex2var_epi64(low, end, high));
        }
    }

    void fetch(size_t row, size_t, size_t output) const override {
        const int8_t* to = next_.tile(row / TILE_ROWS, TILE_ROWS).values + output * TILE_ROWS;
        for (size_t i = 0; i < PANEL * TILE_ROWS; i += CHUNK) __builtin_prefetch(to + i, 1);
    }

  private:
    // Sixteen outputs of four rows: in each quarter a step, four outputs of each row.
    [[gnu::always_inline]] __m512i four_rows(const float* sums, const float* bias) const {
        const __m512 own_bias = _mm512_load_ps(bias);
        __m512i rows[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i)
            rows[i] = rounder_.integers(gelu(_mm512_add_ps(_mm512_load_ps(sums + i * PANEL), own_bias)));
        return _mm512_packus_epi16(_mm512_packs_epi32(rows[0], rows[1]), _mm512_packs_epi32(rows[2], rows[3]));
    }

    static_assert(TILE_ROWS == 8 && STEP == 4);
    Rounded next_;
    Rounder rounder_;
};

// Products of all rows with the outputs of some panels, which are all that a tile of rows is read for.
void multiply_panels(
    const Rounded& rounded, size_t rows, const Weights& weights, size_t start, size_t end, const Target& target) {
    static thread_local std::array<PanelScratch, MOST_PANELS> scratch;
    const auto& multiply = tiles(weights);
    std::array<Panel, MOST_PANELS> panels;
    for (size_t output = start, i = 0; output < end; output += PANEL, ++i)
        panels[i] = pack(weights, output, scratch[i]);
    const size_t count = (end - start + PANEL - 1) / PANEL, stride = (STEP * TILE_ROWS + count - 1) / count;
    const size_t steps = weights.blocks() * (weights.block_size / STEP);
    alignas(64) float sums[TILE_ROWS * PANEL] = {};
    for (size_t row = 0; row < rows; row += TILE_ROWS) {
        const size_t here = std::min(TILE_ROWS, rows - row);
        const Rounded tile = rounded.tile(row / TILE_ROWS, TILE_ROWS);
        const size_t size = row + TILE_ROWS < rows ? tile.steps * STEP * TILE_ROWS : 0;
        Next next{tile.values + size, size ? stride : 0};
        for (size_t output = start; output < end; output += PANEL) {
            const Panel& panel = panels[(output - start) / PANEL];
            target.fetch(row, here, output);
            multiply[here - 1](panel, tile, weights.block_size, next, sums);
            next.values += steps * next.stride;
            target.write(sums, panel.bias, row, here, output);
        }
    }
    _mm_sfence();  // what is written past the caches comes late to other threads otherwise
}

void multiply_all(
    const Rounded& rounded, size_t rows, const Weights& weights, const Target& target, const Parallel& parallel) {
    // As many panels as stay in a second-level cache, so that rows are read less often; but enough work for all threads.
    constexpr size_t CACHE = 512 << 10, TASKS = 16;
    const size_t panels = (weights.outputs + PANEL - 1) / PANEL;
    const size_t fitting = std::min(CACHE / (rounded.steps * STEP * PANEL), panels / TASKS);
    const size_t together = std::clamp<size_t>(fitting, 1, MOST_PANELS) * PANEL;
    parallel((weights.outputs + together - 1) / together, [&](size_t group) {
        const size_t start = group * together, end = std::min(weights.outputs, start + together);
        multiply_panels(rounded, rows, weights, start, end, target);
    });
}

}  // namespace

void multiply_rows(
    const Rounded& rounded, size_t rows, const Weights& weights, float* result, const Parallel& parallel) {
    multiply_all(rounded, rows, weights, Floats(result, rows, weights.outputs), parallel);
}

Rounded multiply_rows_for(
    const Rounded& rounded, size_t rows, const Weights& weights, const GivenRounding& given, const Parallel& parallel) {
    static thread_local Scratch<int8_t> values;
    static thread_local Scratch<float> scales;
    static thread_local Scratch<int32_t> sums;
    const size_t all = round_up(rows, TILE_ROWS), steps = round_up(weights.outputs, PANEL) / STEP;
    const Rounded next{values.of(all * steps * STEP), scales.of(all), sums.of(all), steps, 1};
    std::fill(next.scales, next.scales + all, given.scale);
    multiply_all(rounded, rows, weights, RoundedGelu(next, given), parallel);
    return next;
}

}  // namespace fusion_edge
