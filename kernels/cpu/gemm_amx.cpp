// Micro-kernel of GEMM for AMX: 32 rows times a panel of 32 outputs, two by two tiles.
//
// With static quantization, where both factors are bytes and one int32 sum goes over all inputs.

#include <array>
#include <thread>

#include "amx.h"
#include "gemm_driver.h"
#include "gemm_kernels.h"
#include "simd_activations.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8")

namespace fusion_edge {
namespace {

constexpr size_t SIDES = 2;                 // tiles beside each other in a panel
constexpr size_t PANEL = SIDES * AMX_ROWS;  // outputs
constexpr size_t TILE_PAIR = 2 * AMX_ROWS;  // rows

// Activations in tiles [pairs of tiles, 2, steps], as multiply_tiles reads them. Missing rows and inputs are undefined.
struct TiledRows {
    uint8_t* values;
    size_t steps;

    uint8_t* row(size_t index) const {
        return values + index / AMX_ROWS * steps * AMX_TILE + index % AMX_ROWS * AMX_BYTES;
    }
    // First byte of the tiles that begin with a row.
    const uint8_t* tiles(size_t row) const { return values + row / AMX_ROWS * steps * AMX_TILE; }
};

TiledRows allocate_rows(Scratch<uint8_t>& memory, size_t rows, size_t steps) {
    return {memory.of(round_up(rows, TILE_PAIR) * steps * AMX_BYTES), steps};
}

// Loads 16 words of 4 bytes of 16 outputs and transposes them: register i has word i of each output.
void load_words(const Weights& weights, size_t output, size_t count, size_t start, __m512i* words) {
    const size_t bytes = weights.row_bytes();
    const __mmask64 mask = bytes - start >= CHUNK ? ~0ull : (1ull << (bytes - start)) - 1;
    const uint8_t* from = weights.values + output * bytes + start;
    for (size_t i = 0; i < LANES; ++i, from += bytes) {
        if (i < count) _mm_prefetch(from + CHUNK, _MM_HINT_T1);  // rows are far apart: no prefetch by the hardware
        words[i] = i < count ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
    }
    transpose(words);
}

// A thread's packed panels, and what scales their sums.
class Panels {
  public:
    Panels(const Weights& weights, size_t output, size_t panels)
        : steps_(round_up(weights.inputs, CHUNK) / CHUNK) {
        static thread_local Scratch<uint8_t> memory;
        values_ = memory.of(panels * steps_ * SIDES * AMX_TILE);
        for (size_t i = 0; i < panels; ++i)
            for (size_t side = 0; side < SIDES; ++side) pack_side(weights, output, i, side);
    }

    // Tiles [steps, SIDES] of a panel.
    const uint8_t* tiles(size_t panel) const { return values_ + panel * steps_ * SIDES * AMX_TILE; }

    // Writes sums [rows, PANEL] of a panel as float32.
    void scale(size_t panel, const int32_t* sums, size_t rows, float* scaled) const {
        for (size_t i = 0; i < rows * PANEL; i += LANES) {
            const size_t output = panel * PANEL + i % PANEL;
            const __m512i zero = _mm512_load_si512(zero_points_ + output);
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + i), zero);
            _mm512_store_ps(scaled + i, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(scales_ + output)));
        }
    }

  private:
    void pack_side(const Weights& weights, size_t output, size_t panel, size_t side) {
        const ActivationQuantization& quantization = *weights.static_quantization;
        const size_t index = panel * PANEL + side * LANES, first = output + index;
        const size_t count = weights.outputs > first ? std::min(LANES, weights.outputs - first) : 0;
        uint8_t* to = values_ + (panel * steps_ * SIDES + side) * AMX_TILE;
        __m512i totals = _mm512_setzero_si512();
        for (size_t start = 0; start < weights.inputs; start += CHUNK, to += SIDES * AMX_TILE) {
            __m512i words[LANES];
            load_words(weights, first, count, start, words);
            for (size_t i = 0; i < LANES; ++i) {
                totals = _mm512_dpbusd_epi32(totals, _mm512_set1_epi8(1), words[i]);
                _mm512_store_si512(to + i * AMX_BYTES, words[i]);
            }
        }
        const __m512i zero_point = _mm512_set1_epi32(-quantization.zero_point);
        _mm512_store_si512(zero_points_ + index, _mm512_mullo_epi32(totals, zero_point));
        const __m512 scales = load_scales(weights, first, lane_mask(count));
        _mm512_store_ps(scales_ + index, _mm512_mul_ps(scales, _mm512_set1_ps(quantization.scale)));
    }

    size_t steps_;
    uint8_t* values_;
    alignas(64) float scales_[MAX_PANELS * PANEL];         // of an output's sum
    alignas(64) int32_t zero_points_[MAX_PANELS * PANEL];  // minus the zero point times the sum of an output's weights
};

// Writes a row, activated and as uint8, to its place in the tiles. Weights of inputs after its end are zero.
void pack_row(const float* x, const Weights& weights, Activation activation, size_t steps, uint8_t* to) {
    const ActivationQuantizer quantizer(*weights.static_quantization);
    for (size_t step = 0, start = 0; step < steps; ++step, to += AMX_TILE)
        for (size_t i = 0; i < AMX_BYTES; i += LANES, start += LANES) {
            const __mmask16 mask = start < weights.inputs ? lane_mask(weights.inputs - start) : 0;
            const __m512 values = _mm512_maskz_loadu_ps(mask, x + start);
            const __m512 activated = activation == Activation::GELU ? gelu(values) : values;
            _mm_store_si128(reinterpret_cast<__m128i*>(to + i), quantizer.bytes(activated));
        }
}

// Writes GELU of the results, quantized, as the next layer's activations.
class GeluWriter final : public TileWriter {
  public:
    GeluWriter(size_t rows, const Weights& weights, const ActivationQuantization& quantization)
        : quantizer_(quantization) {
        static thread_local Scratch<uint8_t> memory;
        hidden = allocate_rows(memory, rows, round_up(weights.outputs, AMX_BYTES) / AMX_BYTES);
    }

    void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const override {
        for (size_t i = 0; i < rows; ++i)
            for (size_t j = 0; j < PANEL; j += LANES) {
                const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + j), _mm512_load_ps(bias + j));
                _mm_store_si128(reinterpret_cast<__m128i*>(place(row + i, output + j)), quantizer_.bytes(gelu(sum)));
            }
    }

    TiledRows hidden;

  private:
    uint8_t* place(size_t row, size_t output) const {
        return hidden.row(row) + output / AMX_BYTES * AMX_TILE + output % AMX_BYTES;
    }

    ActivationQuantizer quantizer_;
};

class AmxKernel {
  public:
    static constexpr size_t ROWS = TILE_PAIR, OUTPUTS = PANEL;
    // The sums of a block of rows stay in the L2 cache while blocks of steps are added. Blocks of steps of two tiles of
    // rows stay in the L1 cache for all panels. So few rows come from the L3 cache, which is slow.
    static constexpr size_t BLOCK_ROWS = 480, BLOCK_STEPS = 8;
    using Inputs = TiledRows;
    using HiddenWriter = GeluWriter;

    static Inputs pack_rows(
        const float* x, size_t rows, const Weights& weights, Activation activation, const Parallel& parallel) {
        static thread_local Scratch<uint8_t> memory;
        const Inputs inputs = allocate_rows(memory, rows, round_up(weights.inputs, CHUNK) / CHUNK);
        parallel((rows + ROWS - 1) / ROWS, [&](size_t index) {
            for (size_t row = index * ROWS; row < std::min(rows, (index + 1) * ROWS); ++row)
                pack_row(x + row * weights.inputs, weights, activation, inputs.steps, inputs.row(row));
        });
        return inputs;
    }
    static size_t cached_panels(const Inputs&) { return MAX_PANELS; }
    static size_t min_tasks() {
        static const size_t tasks = 4 * std::max(std::thread::hardware_concurrency(), 1u);
        return tasks;
    }

    AmxKernel(const Inputs& x, size_t, const Weights& weights, size_t output, size_t panels)
        : x_(x), count_(panels), panels_(weights, output, panels) {
        std::fill_n(bias_, panels * OUTPUTS, 0.0f);
        const size_t outputs = std::min(panels * OUTPUTS, weights.outputs - output);
        if (weights.bias) std::copy_n(weights.bias + output, outputs, bias_);
    }

    const float* bias(size_t panel) const { return bias_ + panel * OUTPUTS; }

    template <class Output>
    void multiply(size_t row, size_t rows, const Output& output) {
        static thread_local Scratch<int32_t> memory;
        constexpr size_t TILE = ROWS * OUTPUTS;
        int32_t* const sums = memory.of(round_up(rows, ROWS) * count_ * OUTPUTS);  // [tiles of rows, panels, TILE]
        for (size_t step = 0; step < x_.steps; step += BLOCK_STEPS)
            add_block(row, rows, step, std::min(BLOCK_STEPS, x_.steps - step), sums);
        alignas(64) float scaled[TILE];
        const int32_t* tile = sums;
        for (size_t i = 0; i < rows; i += ROWS)
            for (size_t j = 0; j < count_; ++j, tile += TILE) {
                const size_t here = std::min(ROWS, rows - i);
                panels_.scale(j, tile, here, scaled);
                output.write(scaled, j, row + i, here);
            }
    }

  private:
    // Adds a block of steps to the sums.
    void add_block(size_t row, size_t rows, size_t step, size_t steps, int32_t* sums) {
        constexpr auto MULTIPLY = std::array{
            std::array{multiply_tiles<1, false>, multiply_tiles<1, true>},
            std::array{multiply_tiles<2, false>, multiply_tiles<2, true>}};
        const size_t row_stride = x_.steps * AMX_TILE, column = step * SIDES * AMX_TILE;
        const size_t lines = steps * AMX_STEP_PREFETCH * AMX_BYTES;  // bytes that a call prefetches
        for (size_t i = 0; i < rows; i += ROWS) {
            const uint8_t* const tiles = x_.tiles(row + i) + step * AMX_TILE;
            for (size_t j = 0; j < count_; ++j, sums += ROWS * OUTPUTS) {
                // The next block of these rows, in eight parts, one a panel: four of each tile.
                const uint8_t* next = tiles + steps * AMX_TILE + j % 4 * lines + j / 4 % 2 * row_stride;
                MULTIPLY[rows - i > AMX_ROWS][step > 0](
                    tiles_, tiles, row_stride, panels_.tiles(j) + column, steps, sums, next);
            }
        }
    }

    Inputs x_;
    size_t count_;
    Panels panels_;
    alignas(64) float bias_[MAX_PANELS * PANEL];
    AmxTiles tiles_;
};

}  // namespace

const GemmKernels AMX_GEMM = {gemm_rows<AmxKernel>, mlp_rows<AmxKernel>};

}  // namespace fusion_edge
