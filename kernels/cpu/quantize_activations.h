// Quantization of activations to 8 bits, in the layout that GEMV and GEMM read.

#pragma once

#include "gemm.h"
#include "simd.h"

namespace fusion_edge {

constexpr size_t DOT_WIDTH = 4;  // inputs that VNNI's vpdpbusd multiplies and adds per 32-bit lane
constexpr size_t TILE_ROWS = 8;  // times 3 registers of outputs: 24 of the 32 registers are sums

// Quantized rows in tiles. A tile interleaves its rows by DOT_WIDTH inputs, so a GEMM reads one stream. With 4-bit
// weights, of every 8 inputs those at even positions precede those at odd ones, as in the halves of weight bytes.
struct QuantizedActivations {
    // [tiles, steps, rows of a tile, DOT_WIDTH]. Dynamic: int8, zero after the last input. Static: uint8, undefined
    // after the last input, where weights are zero.
    int8_t* values;
    float* scales;  // [tiles, blocks, rows of a tile]
    // [tiles, blocks, rows of a tile]: minus the sum of a block's values, times the zero point of the weights if it is
    // the same for all. Undefined with static quantization.
    int32_t* sums;
    size_t steps, blocks;  // steps: groups of DOT_WIDTH inputs in a row

    // Returns tile `index` of tiles with `rows` rows.
    QuantizedActivations tile(size_t index, size_t rows) const {
        return {
            values + index * steps * rows * DOT_WIDTH, scales + index * blocks * rows, sums + index * blocks * rows,
            steps, blocks};
    }
};

// Quantizes x [rows, inputs] into tiles of `tile_rows` rows (1 or TILE_ROWS), in memory that the calling thread keeps.
// Missing rows of the last tile are undefined.
QuantizedActivations quantize_activations(
    const float* x, size_t rows, size_t tile_rows, const Weights& weights, Activation activation,
    const Parallel& parallel);

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

// Static quantization of registers, with the results of ONNX's QuantizeLinear.
class ActivationQuantizer {
  public:
    [[gnu::always_inline]] explicit ActivationQuantizer(const ActivationQuantization& quantization)
        : scale_(_mm512_set1_ps(quantization.scale)),
          inverse_(_mm512_set1_ps(1 / quantization.scale)),
          extent_(_mm512_set1_ps(256 * quantization.scale)),
          zero_point_(_mm512_set1_epi32(quantization.zero_point)) {}

    // Before the clamp to 0 ... 255, which values exceed by less than 512.
    [[gnu::always_inline]] __m512i integers(__m512 x) const {
        const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), extent_);
        const __m512 near = _mm512_min_ps(_mm512_max_ps(x, least), extent_);
        // Correctly rounded quotient x / scale without a division, which costs as much as ten other instructions: the
        // residual corrects the product with the inverse (https://doi.org/10.1147/rd.341.0111).
        const __m512 quotient = _mm512_mul_ps(near, inverse_);
        const __m512 exact = _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, scale_, near), inverse_, quotient);
        return _mm512_add_epi32(_mm512_cvtps_epi32(exact), zero_point_);
    }

    [[gnu::always_inline]] __m128i bytes(__m512 x) const {
        return _mm512_cvtusepi32_epi8(_mm512_max_epi32(integers(x), _mm512_setzero_si512()));
    }

  private:
    __m512 scale_, inverse_, extent_;
    __m512i zero_point_;
};

#pragma GCC pop_options

}  // namespace fusion_edge
