// Rows of inputs, rounded to int8.

#pragma once

#include "lanes.h"
#include "products.h"

namespace fusion_edge {

constexpr size_t STEP = 4;       // inputs that an instruction multiplies and adds in each lane
constexpr size_t TILE_ROWS = 8;  // with three registers of outputs: 24 of the 32 registers are sums

// A tile of so many rows lies side by side: by turns four inputs of each, so that a product reads one stream. Of every 8
// values, those of even places come before those of odd ones if weights have 4 bits, as the halves of the weights' bytes
// do.
struct Rounded {
    // [tiles, steps, rows of a tile, 4]: int8, zero behind the last input. Or uint8, if rounding was given, and anything
    // behind the last input, where weights are zero.
    int8_t* values;
    float* scales;   // [tiles, blocks, rows of a tile]
    // [tiles, blocks, rows of a tile]: minus the sum of the values, times the zero point if all weights have the same; not
    // filled if the rounding was given
    int32_t* sums;
    size_t steps, blocks;

    // A tile of so many rows.
    Rounded tile(size_t index, size_t rows) const {
        return {
            values + index * steps * rows * STEP, scales + index * blocks * rows, sums + index * blocks * rows, steps,
            blocks};
    }
};

// Rows [rows, inputs] in tiles of one or of TILE_ROWS, in memory that the calling thread keeps. Missing rows of the last
// tile hold anything.
Rounded round(
    const float* x, size_t rows, size_t of_tile, const Weights& weights, Activation activation,
    const Parallel& parallel);

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

// Rounds values as QuantizeLinear does: round(x / scale) + zero_point, from 0 to 255.
class Rounder {
  public:
    [[gnu::always_inline]] explicit Rounder(const GivenRounding& given)
        : scale_(_mm512_set1_ps(given.scale)),
          inverse_(_mm512_set1_ps(1 / given.scale)),
          extent_(_mm512_set1_ps(256 * given.scale)),
          zero_point_(_mm512_set1_epi32(given.zero_point)) {}

    // Not yet cut to 0 and 255, from which they are less than 512 off.
    [[gnu::always_inline]] __m512i integers(__m512 x) const {
        const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), extent_);
        const __m512 near = _mm512_min_ps(_mm512_max_ps(x, least), extent_);
        // The quotient to the last bit, without a division, which takes as long as ten of the rest: what the product with
        // the inverse leaves is divided once more (https://doi.org/10.1147/rd.341.0111).
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
