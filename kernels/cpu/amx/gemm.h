// Micro-kernel of GEMM for AMX: panels of 32 outputs times 32 rows, two by two tiles.

#pragma once

#include <type_traits>

#include "panels.h"

namespace fusion_edge::SIMD::amx_gemm {

constexpr size_t PANEL = AMX_PANEL;
constexpr size_t TILE_PAIR = 2 * AMX_ROWS;       // rows
constexpr size_t TILE = PANEL * TILE_PAIR;       // sums of a panel and two tiles of rows
constexpr size_t STEP_PREFETCH = 4;              // lines of 64 bytes
using Tile = int32_t[TILE];  // sums [PANEL, TILE_PAIR]

enum class Sums { INTEGER, SCALED, SCALED_WITH_ZERO_POINTS };

// Sums of a superblock, to be added to totals [PANEL, TILE_PAIR].
struct Pending {
    int32_t* sums;
    void* totals;
    const float *scales, *zero_points;  // [PANEL]
    const float *x_scales, *x_sums;     // [AMX_ROWS] of the first tile of rows
    size_t x_stride;                    // from the first to the second tile
    __mmask16 added;                    // 0: the totals are undefined yet

    // Adds those of outputs from `output` to `end`.
    template <Sums KIND, int ROW_TILES>
    [[gnu::always_inline]] void add(size_t output, size_t end) const {
        const int32_t* from = sums + output * TILE_PAIR;
        if constexpr (KIND == Sums::INTEGER) {
            int32_t* to = static_cast<int32_t*>(totals) + output * TILE_PAIR;
            for (; output < end; ++output, from += TILE_PAIR, to += TILE_PAIR)
#pragma GCC unroll 2
                for (int i = 0; i < ROW_TILES; ++i) {
                    const __m512i sum = _mm512_load_si512(from + i * LANES);
                    const __m512i before = _mm512_maskz_load_epi32(added, to + i * LANES);
                    _mm512_store_si512(to + i * LANES, _mm512_add_epi32(sum, before));
                }
        } else {
            float* to = static_cast<float*>(totals) + output * TILE_PAIR;
            __m512 row_scales[ROW_TILES], row_sums[ROW_TILES];
#pragma GCC unroll 2
            for (int i = 0; i < ROW_TILES; ++i) {
                row_scales[i] = _mm512_load_ps(x_scales + i * x_stride);
                row_sums[i] = _mm512_load_ps(x_sums + i * x_stride);
            }
            for (; output < end; ++output, from += TILE_PAIR, to += TILE_PAIR) {
#pragma GCC unroll 2
                for (int i = 0; i < ROW_TILES; ++i) {
                    __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(from + i * LANES));
                    if constexpr (KIND == Sums::SCALED_WITH_ZERO_POINTS)
                        sum = _mm512_fnmadd_ps(row_sums[i], _mm512_set1_ps(zero_points[output]), sum);
                    const __m512 factor = _mm512_mul_ps(row_scales[i], _mm512_set1_ps(scales[output]));
                    const __m512 before = _mm512_maskz_load_ps(added, to + i * LANES);
                    _mm512_store_ps(to + i * LANES, _mm512_fmadd_ps(sum, factor, before));
                }
            }
        }
    }
};

// Stores a tile of sums, if there are any, and sets it to zero.
template <int TILE>
[[gnu::always_inline]] inline void renew(AmxTiles& tiles, int32_t* sums) {
    constexpr size_t STRIDE = TILE_PAIR * sizeof(int32_t);
    if (sums) tiles.store<TILE>(sums + TILE / 2 * AMX_ROWS * TILE_PAIR + TILE % 2 * LANES, STRIDE);
    tiles.zero<TILE>();
}

// Tiles 0 ... 3 [2, 2] = weights * rows. `weights` are steps of a panel; `rows` ROW_TILES sequences of `steps` tiles,
// `stride` bytes apart. The tiles before are stored and added to their totals meanwhile: a part of the pending sums in
// each step. Prefetches `next`.
template <Sums KIND, int ROW_TILES>
void multiply_tiles(
    AmxTiles& tiles, const uint8_t* weights, const uint8_t* rows, size_t stride, size_t steps, const uint8_t*& next,
    const Pending& pending) {
    constexpr bool UNSIGNED = KIND == Sums::INTEGER;
    const uint8_t* second = rows + stride;
    const auto multiply = [&](auto first) __attribute__((always_inline)) {
        for (size_t i = 0; i < STEP_PREFETCH; ++i, next += AMX_BYTES) _mm_prefetch(next, _MM_HINT_T1);
        tiles.load<6>(rows);
        tiles.load<4>(weights);
        if constexpr (first) renew<0>(tiles, pending.sums);
        tiles.multiply_add<0, 4, 6, UNSIGNED>();
        tiles.load<5>(weights + AMX_TILE);
        if constexpr (first) renew<2>(tiles, pending.sums);
        tiles.multiply_add<2, 5, 6, UNSIGNED>();
        if constexpr (ROW_TILES == 2) {
            tiles.load<7>(second);
            if constexpr (first) renew<1>(tiles, pending.sums);
            tiles.multiply_add<1, 4, 7, UNSIGNED>();
            if constexpr (first) renew<3>(tiles, pending.sums);
            tiles.multiply_add<3, 5, 7, UNSIGNED>();
        }
        rows += AMX_TILE;
        second += AMX_TILE;
        weights += AMX_STEP;
    };
    multiply(std::true_type());
    const size_t part = (PANEL + steps - 2) / std::max<size_t>(steps - 1, 1);
    for (size_t step = 1, output = 0; step < steps; ++step, output += part) {
        multiply(std::false_type());
        if (pending.sums) pending.add<KIND, ROW_TILES>(std::min(output, PANEL), std::min(output + part, PANEL));
    }
    if (steps == 1 && pending.sums) pending.add<KIND, ROW_TILES>(0, PANEL);
}

// Writers take sums [OUTPUTS, ROWS].

class TransposingWriter final : public TileWriter {
  public:
    TransposingWriter(float* result, size_t rows, size_t outputs) : writer_(result, rows, outputs) {}

    void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const override {
        alignas(64) float transposed[AMX_ROWS * PANEL];
        for (size_t i = 0; i < rows; i += AMX_ROWS) {
            for (size_t j = 0; j < PANEL; j += AMX_ROWS) {
                __m512i words[LANES];
                for (size_t k = 0; k < LANES; ++k) words[k] = _mm512_load_si512(sums + (j + k) * TILE_PAIR + i);
                transpose(words);
                for (size_t k = 0; k < LANES; ++k) _mm512_store_si512(transposed + k * PANEL + j, words[k]);
            }
            writer_.write(transposed, bias, row + i, std::min(AMX_ROWS, rows - i), output);
        }
    }

    void prefetch(size_t row, size_t rows, size_t output) const override { writer_.prefetch(row, rows, output); }

  private:
    FloatWriter<PANEL> writer_;
};

// Writes GELU of the results, quantized, as the next layer's activations.
class GeluWriter final : public TileWriter {
  public:
    GeluWriter(size_t rows, const Weights& weights, const ActivationQuantization& quantization)
        : quantizer_(quantization) {
        static thread_local Scratch<uint8_t> memory;
        hidden = allocate_amx_rows(memory, rows, round_up(weights.outputs, AMX_BYTES));
    }

    void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const override {
        for (size_t i = 0; i < rows; i += AMX_ROWS) {
            uint8_t* to = hidden.tile((row + i) / AMX_ROWS) + output * AMX_ROWS;
            for (size_t j = 0; j < PANEL; j += 4, to += AMX_BYTES) {
                __m512i words = _mm512_setzero_si512();
#pragma GCC unroll 4
                for (size_t k = 0; k < 4; ++k) {
                    const __m512 sum = _mm512_load_ps(sums + (j + k) * TILE_PAIR + i);
                    const __m512i integers = quantizer_.integers(gelu(_mm512_add_ps(sum, _mm512_set1_ps(bias[j + k]))));
                    const __m512i bytes = _mm512_min_epi32(
                        _mm512_max_epi32(integers, _mm512_setzero_si512()), _mm512_set1_epi32(255));
                    words = _mm512_or_si512(words, _mm512_slli_epi32(bytes, 8 * k));
                }
                _mm512_store_si512(to, words);
            }
        }
    }

    AmxRows hidden;

  private:
    ActivationQuantizer quantizer_;
};

template <Sums KIND>
class AmxKernel {
  public:
    static constexpr size_t ROWS = TILE_PAIR, OUTPUTS = PANEL;
    // Blocks of rows and inputs: with 256 outputs, sums, weights and rows stay in the L2 cache, of 2 MB or more in
    // processors with AMX, and two tiles of
    // rows in the L1 cache. So few rows come from the L3 cache, which is slow.
    static constexpr size_t BLOCK_ROWS = 480, BLOCK_INPUTS = 512;
    static constexpr size_t STREAMED_ROWS = 64;  // up to here weights are read in memory order, a panel at a time
    static constexpr size_t KEPT = 800 << 10;  // bytes of unpacked weights that all blocks of rows share
    using Inputs = AmxRows;
    using ResultWriter = TransposingWriter;
    using HiddenWriter = GeluWriter;

    static Inputs pack_rows(
        const float* x, size_t rows, const Weights& weights, Activation activation, const Parallel& parallel) {
        return pack_amx_rows(x, rows, weights, activation, parallel);
    }
    static size_t cached_panels(const Inputs&) { return MAX_PANELS; }

    AmxKernel(const Inputs& x, size_t, const Weights& weights, size_t output, size_t panels)
        : x_(x), steps_(weights), count_(panels), panels_(weights, output, panels), tiles_(steps_.depth) {
        std::fill_n(bias_, panels * OUTPUTS, 0.0f);
        const size_t outputs = std::min(panels * OUTPUTS, weights.outputs - output);
        if (weights.bias) std::copy_n(weights.bias + output, outputs, bias_);
    }

    const float* bias(size_t panel) const { return bias_ + panel * OUTPUTS; }

    template <class Output>
    void multiply(size_t row, size_t rows, const Output& output) {
        static thread_local Scratch<int32_t> memory;
        const bool is_few = rows <= STREAMED_ROWS;
        const size_t panels = is_few ? 1 : count_, width = steps_.width;
        // Inputs unpacked at a time.
        const size_t part = is_few || panels * OUTPUTS * width <= KEPT ? width : BLOCK_INPUTS;
        int32_t* const totals = memory.of(round_up(rows, ROWS) * panels * OUTPUTS);  // [pairs, panels, TILE]
        for (size_t panel = 0; panel < count_; panel += panels) {
            for (size_t start = 0; start < width; start += part) {
                const size_t end = std::min(start + part, width), block = is_few ? width : BLOCK_INPUTS;
                if (part < width || is_few || row == 0) unpacked_ = panels_.unpack(panel, panels, start, end);
                for (size_t from = start; from < end; from += block)
                    add_block(
                        {from, std::min(from + block, end), unpacked_ + (from - start) / AMX_BYTES * AMX_STEP,
                         (end - start) / AMX_BYTES * AMX_STEP},
                        row, rows, panel, panels, totals);
            }
            write(row, rows, panel, panels, totals, output);
        }
    }

  private:
    // Inputs of unpacked panels, `stride` bytes apart.
    struct Block {
        size_t start, end;
        const uint8_t* weights;
        size_t stride;
    };

    void add_block(const Block& block, size_t row, size_t rows, size_t panel, size_t panels, int32_t* totals) {
        for (size_t i = 0; i < rows; i += ROWS, totals += panels * TILE) {
            const auto run = rows - i > AMX_ROWS ? &AmxKernel::multiply_rows<2> : &AmxKernel::multiply_rows<1>;
            (this->*run)(block, (row + i) / AMX_ROWS, panel, panels, totals);
        }
    }

    template <int ROW_TILES>
    void multiply_rows(const Block& block, size_t tile, size_t panel, size_t panels, int32_t* totals) {
        const size_t stride = x_.width * AMX_ROWS, scale_stride = x_.superblocks * AMX_ROWS;
        const uint8_t* const x = x_.tile(tile);
        const uint8_t* next = x + block.end * AMX_ROWS;  // the next inputs of these rows
        Pending pending{};
        for (size_t j = 0; j < panels; ++j, totals += TILE) {
            if (j == panels / 2 && j > 0) next = x + stride + block.end * AMX_ROWS;
            const float* const scales = panels_.scales(panel + j);
            const float* const zero_points = panels_.zero_points(panel + j);
            size_t superblock = block.start / steps_.superblock;
            for (size_t from = block.start; from < block.end; from += steps_.superblock, ++superblock) {
                const size_t inputs = std::min(steps_.superblock, block.end - from), offset = from - block.start;
                const uint8_t* const weights = block.weights + j * block.stride + offset / AMX_BYTES * AMX_STEP;
                multiply_tiles<KIND, ROW_TILES>(
                    tiles_, weights + offset % AMX_BYTES, x + from * AMX_ROWS, stride,
                    (inputs + AMX_BYTES - 1) / AMX_BYTES, next, pending);
                const size_t column = superblock * PANEL, x_column = tile * scale_stride + superblock * AMX_ROWS;
                pending = {
                    sums_, totals, scales + column, zero_points + column, nullptr, nullptr, scale_stride,
                    __mmask16(from ? -1 : 0)};
                if constexpr (KIND != Sums::INTEGER) {
                    pending.x_scales = x_.scales + x_column;
                    pending.x_sums = x_.sums + x_column;
                }
            }
        }
        renew<0>(tiles_, sums_);
        renew<2>(tiles_, sums_);
        if constexpr (ROW_TILES == 2) {
            renew<1>(tiles_, sums_);
            renew<3>(tiles_, sums_);
        }
        pending.add<KIND, ROW_TILES>(0, PANEL);
    }

    template <class Output>
    void write(size_t row, size_t rows, size_t panel, size_t panels, int32_t* totals, const Output& output) {
        for (size_t i = 0; i < rows; i += ROWS)
            for (size_t j = 0; j < panels; ++j, totals += TILE) {
                float* const scaled = reinterpret_cast<float*>(totals);
                const size_t here = std::min(ROWS, rows - i);
                if constexpr (KIND == Sums::INTEGER) {
                    const float* const scales = panels_.scales(panel + j);
                    const int32_t* const zero_points = panels_.corrections(panel + j);
                    for (size_t k = 0; k < PANEL; ++k)
                        for (size_t at = k * TILE_PAIR; at < k * TILE_PAIR + here; at += LANES) {
                            const __m512i zero = _mm512_set1_epi32(zero_points[k]);
                            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(totals + at), zero);
                            const __m512 scale = _mm512_set1_ps(scales[k]);
                            _mm512_store_ps(scaled + at, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
                        }
                }
                if (j + 1 < panels) output.prefetch(panel + j + 1, row + i, here);
                output.write(scaled, panel + j, row + i, here);
            }
    }

    Inputs x_;
    AmxSteps steps_;
    size_t count_;
    AmxPanels panels_;
    const uint8_t* unpacked_ = nullptr;
    alignas(64) float bias_[MAX_PANELS * PANEL];
    alignas(64) Tile sums_;
    AmxTiles tiles_;
};

}  // namespace fusion_edge::SIMD::amx_gemm

namespace fusion_edge::SIMD {

// GEMMs of more than FEW_ROWS rows.
struct AmxGemm {
    static void gemm(
        const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
        const Parallel& parallel) {
        using namespace amx_gemm;
        constexpr auto WITH_ZERO_POINTS = gemm_rows<AmxKernel<Sums::SCALED_WITH_ZERO_POINTS>>;
        const auto run = weights.static_quantization                ? gemm_rows<AmxKernel<Sums::INTEGER>>
                         : weights.bits == 8 && weights.zero_points ? WITH_ZERO_POINTS
                                                                    : gemm_rows<AmxKernel<Sums::SCALED>>;
        run(x, rows, weights, activation, result, parallel);
    }

    static void mlp(
        const float* x, size_t rows, const Weights& up, const Weights& down, float* result, const Parallel& parallel) {
        using namespace amx_gemm;
        mlp_rows<AmxKernel<Sums::INTEGER>>(x, rows, up, down, result, parallel);
    }
};

}  // namespace fusion_edge::SIMD
