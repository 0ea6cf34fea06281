// Micro-kernel of GEMM for AVX-512 VNNI: 8 rows of activations times a panel of 48 outputs.
//
// A panel interleaves its outputs by DOT_WIDTH inputs. Each broadcast of a row's inputs serves three registers of
// outputs; a tile of 12 rows by 32 outputs would be bound by loads instead.

#include <algorithm>
#include <array>
#include <utility>

#include "gemm_driver.h"
#include "gemm_kernels.h"
#include "simd_activations.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t REGISTERS = 3;              // of outputs
constexpr size_t PANEL = REGISTERS * LANES;  // outputs of a tile

// The operand with a zero point, which is unsigned; the other is signed. Activations have one with static quantization;
// weights have one for all, or one per block.
enum class ZeroPoint { OF_ACTIVATIONS, OF_WEIGHTS, OF_BLOCKS };

// Packed weights of PANEL outputs.
struct Panel {
    const uint8_t* values;       // [steps, PANEL, DOT_WIDTH]; inputs in the order of QuantizedActivations
    const float* scales;         // [blocks, PANEL]
    // [blocks, PANEL]: zero points of weights (undefined if all are the same); or, with static quantization, minus the
    // zero point of activations times the sum of the weights.
    const int32_t* zero_points;
    const float* bias;           // [PANEL]
};

// Memory of one packed panel.
struct PanelScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zero_points;
    alignas(64) float bias[PANEL];
};

// Packs the values of `count` outputs and, with static quantization, sums the values of each.
void pack_values(const Weights& weights, size_t output, size_t count, uint8_t* to, int32_t* sums) {
    const size_t bytes = weights.row_bytes();
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i totals[PANEL] = {};
    const __m512i half = _mm512_set1_epi8(15);
    // Prefetch in memory order: the loop below reads 48 rows in turns, which is slow from memory.
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
                if (weights.static_quantization) totals[one] = _mm512_dpbusd_epi32(totals[one], ones, rows[i]);
            }
            transpose(rows);
            for (size_t i = 0; i < LANES; ++i) {
                uint8_t* step = to + (start / DOT_WIDTH + i) * (8 / weights.bits) * DOT_WIDTH * PANEL + side * CHUNK;
                if (weights.bits == 8) {
                    _mm512_store_si512(step, rows[i]);
                } else {
                    _mm512_store_si512(step, _mm512_and_si512(rows[i], half));
                    _mm512_store_si512(step + DOT_WIDTH * PANEL, _mm512_and_si512(_mm512_srli_epi16(rows[i], 4), half));
                }
            }
        }
    }
    for (size_t i = 0; weights.static_quantization && i < PANEL; ++i) sums[i] = _mm512_reduce_add_epi32(totals[i]);
}

// Packs the panel of outputs from `output` on.
Panel pack(const Weights& weights, size_t output, PanelScratch& scratch) {
    const size_t blocks = weights.blocks(), count = std::min(PANEL, weights.outputs - output);
    uint8_t* to = scratch.values.of(round_up(weights.row_bytes(), CHUNK) * (8 / weights.bits) * PANEL);
    int32_t sums[PANEL];
    pack_values(weights, output, count, to, sums);
    float* packed_scales = scratch.scales.of(round_up(blocks, LANES) * PANEL);
    for (size_t block = 0; block < blocks; block += LANES)
        for (size_t side = 0; side < REGISTERS; ++side) {
            __m512i rows[LANES];
            for (size_t i = 0; i < LANES; ++i) {
                const size_t one = side * LANES + i;
                const __mmask16 mask = one < count ? lane_mask(blocks - block) : 0;
                rows[i] = _mm512_castps_si512(load_scales(weights, (output + one) * blocks + block, mask));
            }
            transpose(rows);
            for (size_t i = 0; i < LANES; ++i)
                _mm512_store_si512(packed_scales + (block + i) * PANEL + side * LANES, rows[i]);
        }
    int32_t* zero = scratch.zero_points.of(blocks * PANEL);
    for (size_t i = 0; weights.zero_points && i < count; ++i) {
        const uint8_t* row = weights.zero_points + (output + i) * weights.zero_point_bytes();
        for (size_t block = 0; block < blocks; ++block)
            zero[block * PANEL + i] = weights.bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
    }
    for (size_t i = 0; i < PANEL; ++i) {
        scratch.bias[i] = weights.bias && i < count ? weights.bias[output + i] : 0;
        if (weights.static_quantization) zero[i] = -weights.static_quantization->zero_point * sums[i];
    }
    return {to, packed_scales, zero, scratch.bias};
}

// Inline assembly: with intrinsics GCC 12 copies each accumulator and keeps totals in two places.

// Accumulators of one row.
using Sums = __m512i[REGISTERS];

[[gnu::always_inline]] inline __m512i broadcast(const int32_t* value) {
    __m512i values;
    asm volatile("vpbroadcastd %1, %0" : "=v"(values) : "m"(*value));
    return values;
}

// Adds the dot product of four weights and four activations to each lane. vpdpbusd takes the unsigned operand first.
template <ZeroPoint ZERO>
[[gnu::always_inline]] inline void multiply_add(Sums& sums, const Sums& weights, const int8_t* x) {
    const int32_t& four = *reinterpret_cast<const int32_t*>(x);
    __m512i inputs;
    if constexpr (ZERO == ZeroPoint::OF_ACTIVATIONS)
        asm("vpbroadcastd %7, %3\n\tvpdpbusd %4, %3, %0\n\tvpdpbusd %5, %3, %1\n\tvpdpbusd %6, %3, %2"
            : "+&v"(sums[0]), "+&v"(sums[1]), "+&v"(sums[2]), "=&v"(inputs)
            : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(four));
    else
        asm("vpbroadcastd %7, %3\n\tvpdpbusd %3, %4, %0\n\tvpdpbusd %3, %5, %1\n\tvpdpbusd %3, %6, %2"
            : "+&v"(sums[0]), "+&v"(sums[1]), "+&v"(sums[2]), "=&v"(inputs)
            : "v"(weights[0]), "v"(weights[1]), "v"(weights[2]), "m"(four));
}

// totals += float(sums) * scales * x_scale, for 16 outputs. Clobbers the sums.
[[gnu::always_inline]] inline void add_block(__m512i& sums, __m512 scales, const float* x_scale, float* totals) {
    __m512 product;
    asm("vmulps %4%{1to16%}, %3, %2\n\tvcvtdq2ps %0, %0\n\tvfmadd213ps %1, %2, %0\n\tvmovaps %0, %1"
        : "+v"(sums), "+m"(*reinterpret_cast<float(*)[LANES]>(totals)), "=&v"(product)
        : "v"(scales), "m"(*x_scale));
}

// Prefetch of the next tile of rows, a few bytes in each step. Without it, rows outside of the L2 cache arrive late;
// prefetched all at once, they delay the current loads.
struct NextTile {
    const int8_t* values;
    size_t stride;  // bytes a step
};

// Row indices I are compile-time constants, so GCC keeps the accumulators in registers.
template <ZeroPoint ZERO, size_t... I>
void matmul_rows(
    std::index_sequence<I...>, const Panel& panel, const QuantizedActivations& tile, size_t block_size, NextTile next,
    float* result) {
    constexpr size_t ROWS = sizeof...(I);
    const uint8_t* weight = panel.values;
    const int8_t* x = tile.values;
    const float* x_scales = tile.scales;
    const int32_t* x_sums = tile.sums;
    for (size_t i = 0; i < ROWS * PANEL; i += LANES) _mm512_store_ps(result + i, _mm512_setzero_ps());
    for (size_t block = 0; block < tile.blocks; ++block, x_scales += TILE_ROWS, x_sums += TILE_ROWS) {
        Sums sums[ROWS];
        if constexpr (ZERO == ZeroPoint::OF_ACTIVATIONS) {
            const int32_t* zero = panel.zero_points;  // there is one block
            ((sums[I][0] = _mm512_load_si512(zero), sums[I][1] = _mm512_load_si512(zero + LANES),
              sums[I][2] = _mm512_load_si512(zero + 2 * LANES)), ...);
        } else if constexpr (ZERO == ZeroPoint::OF_WEIGHTS) {
            ((sums[I][0] = sums[I][1] = sums[I][2] = broadcast(x_sums + I)), ...);
        } else {
            const int32_t* zero = panel.zero_points + block * PANEL;
#pragma GCC unroll 3
            for (size_t i = 0; i < REGISTERS; ++i) {
                const __m512i zeros = _mm512_load_si512(zero + i * LANES);
                ((sums[I][i] = _mm512_mullo_epi32(_mm512_set1_epi32(x_sums[I]), zeros)), ...);
            }
        }
        const size_t steps = block_size / DOT_WIDTH;
        for (size_t step = 0; step < steps; ++step, weight += DOT_WIDTH * PANEL, x += DOT_WIDTH * TILE_ROWS) {
            const Sums weights = {
                _mm512_load_si512(weight), _mm512_load_si512(weight + CHUNK), _mm512_load_si512(weight + 2 * CHUNK)};
            (multiply_add<ZERO>(sums[I], weights, x + I * DOT_WIDTH), ...);
            _mm_prefetch(next.values, _MM_HINT_T1);
            next.values += next.stride;
        }
        float* totals = result;
        asm("" : "+r"(totals));  // one base address for all stores
#pragma GCC unroll 3
        for (size_t i = 0; i < REGISTERS; ++i) {
            const __m512 scales = _mm512_load_ps(panel.scales + block * PANEL + i * LANES);
            (add_block(sums[I][i], scales, x_scales + I, totals + I * PANEL + i * LANES), ...);
        }
    }
}

using MatmulTile = void (*)(const Panel&, const QuantizedActivations&, size_t, NextTile, float*);

template <ZeroPoint ZERO, size_t ROWS>
void matmul_tile(
    const Panel& panel, const QuantizedActivations& tile, size_t block_size, NextTile next, float* result) {
    matmul_rows<ZERO>(std::make_index_sequence<ROWS>(), panel, tile, block_size, next, result);
}

// Index: number of rows - 1.
template <ZeroPoint ZERO, size_t... I>
constexpr std::array<MatmulTile, TILE_ROWS> matmul_tiles(std::index_sequence<I...>) {
    return {matmul_tile<ZERO, I + 1>...};
}

const std::array<MatmulTile, TILE_ROWS>& matmul_tiles(const Weights& weights) {
    constexpr auto ROWS = std::make_index_sequence<TILE_ROWS>();
    static constexpr auto ACTIVATIONS = matmul_tiles<ZeroPoint::OF_ACTIVATIONS>(ROWS);
    static constexpr auto ALL_WEIGHTS = matmul_tiles<ZeroPoint::OF_WEIGHTS>(ROWS);
    static constexpr auto BLOCKS = matmul_tiles<ZeroPoint::OF_BLOCKS>(ROWS);
    return weights.static_quantization ? ACTIVATIONS : weights.zero_points ? BLOCKS : ALL_WEIGHTS;
}

// Writes GELU of the results, quantized, as the next layer's activations.
class GeluWriter final : public TileWriter {
  public:
    // Missing rows of the last tile are undefined.
    GeluWriter(size_t rows, const Weights& weights, const ActivationQuantization& quantization)
        : quantizer_(quantization) {
        static thread_local Scratch<int8_t> values;
        static thread_local Scratch<float> scales;
        static thread_local Scratch<int32_t> sums;
        const size_t all = round_up(rows, TILE_ROWS), steps = round_up(weights.outputs, PANEL) / DOT_WIDTH;
        hidden = {values.of(all * steps * DOT_WIDTH), scales.of(all), sums.of(all), steps, 1};
        std::fill(hidden.scales, hidden.scales + all, quantization.scale);
    }

    void write(const float* sums, const float* bias, size_t row, size_t, size_t output) const override {
        int8_t* to = hidden.tile(row / TILE_ROWS, TILE_ROWS).values + output * TILE_ROWS;
        for (size_t j = 0; j < PANEL; j += LANES, to += LANES * TILE_ROWS) {
            const __m512i low = four_rows(sums + j, bias + j), high = four_rows(sums + 4 * PANEL + j, bias + j);
            const __m512i start = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            const __m512i end = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            _mm512_store_si512(to, _mm512_permutex2var_epi64(low, start, high));
            _mm512_store_si512(to + CHUNK, _mm512_permutex2var_epi64(low, end, high));
        }
    }

    void prefetch(size_t row, size_t, size_t output) const override {
        const int8_t* to = hidden.tile(row / TILE_ROWS, TILE_ROWS).values + output * TILE_ROWS;
        for (size_t i = 0; i < PANEL * TILE_ROWS; i += CHUNK) __builtin_prefetch(to + i, 1);
    }

    QuantizedActivations hidden;

  private:
    // 16 outputs of four rows: each quarter of the register has four outputs of each row.
    [[gnu::always_inline]] __m512i four_rows(const float* sums, const float* bias) const {
        const __m512 bias_lanes = _mm512_load_ps(bias);
        __m512i rows[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i)
            rows[i] = quantizer_.integers(gelu(_mm512_add_ps(_mm512_load_ps(sums + i * PANEL), bias_lanes)));
        return _mm512_packus_epi16(_mm512_packs_epi32(rows[0], rows[1]), _mm512_packs_epi32(rows[2], rows[3]));
    }

    static_assert(TILE_ROWS == 8 && DOT_WIDTH == 4);
    ActivationQuantizer quantizer_;
};

class VnniKernel {
  public:
    static constexpr size_t ROWS = TILE_ROWS, OUTPUTS = PANEL, BLOCK_ROWS = ROWS;
    using Inputs = QuantizedActivations;
    using ResultWriter = FloatWriter<OUTPUTS>;
    using HiddenWriter = GeluWriter;

    static Inputs pack_rows(
        const float* x, size_t rows, const Weights& weights, Activation activation, const Parallel& parallel) {
        return quantize_activations(x, rows, ROWS, weights, activation, parallel);
    }
    static size_t cached_panels(const Inputs& x) {
        constexpr size_t CACHE = 512 << 10;
        return CACHE / (x.steps * DOT_WIDTH * OUTPUTS);
    }
    static size_t min_tasks() { return 16; }

    VnniKernel(const Inputs& x, size_t rows, const Weights& weights, size_t output, size_t panels)
        : x_(x),
          rows_(rows),
          count_(panels),
          block_size_(weights.block_size),
          steps_(weights.blocks() * (weights.block_size / DOT_WIDTH)),
          matmul_(matmul_tiles(weights)) {
        static thread_local std::array<PanelScratch, MAX_PANELS> scratch;
        for (size_t i = 0; i < panels; ++i) panels_[i] = pack(weights, output + i * OUTPUTS, scratch[i]);
    }

    const float* bias(size_t panel) const { return panels_[panel].bias; }

    template <class Output>
    void multiply(size_t row, size_t rows, const Output& output) const {
        const QuantizedActivations tile = x_.tile(row / ROWS, ROWS);
        const size_t size = row + ROWS < rows_ ? tile.steps * DOT_WIDTH * ROWS : 0;
        NextTile next{tile.values + size, size ? (DOT_WIDTH * ROWS + count_ - 1) / count_ : 0};
        alignas(64) float sums[ROWS * OUTPUTS] = {};
        for (size_t i = 0; i < count_; ++i) {
            output.prefetch(i, row, rows);
            matmul_[rows - 1](panels_[i], tile, block_size_, next, sums);
            next.values += steps_ * next.stride;
            output.write(sums, i, row, rows);
        }
    }

  private:
    Inputs x_;
    size_t rows_, count_, block_size_, steps_;
    std::array<Panel, MAX_PANELS> panels_;
    const std::array<MatmulTile, TILE_ROWS>& matmul_;
};

}  // namespace

const GemmKernels VNNI_GEMM = {gemm_rows<VnniKernel>, mlp_rows<VnniKernel>};

}  // namespace fusion_edge
