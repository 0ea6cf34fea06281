// Kernels of linear layers: GEMV for one row, tiled GEMM for more.

#pragma once

#include "quantize_activations.h"
#include "simd.h"

namespace fusion_edge {

constexpr size_t CHUNK = 64;  // bytes of weights in one register

// result [outputs] of one row.
void gemv(const QuantizedActivations& x, const Weights& weights, float* result, const Parallel& parallel);

// result [rows, outputs].
void gemm_tiles(
    const QuantizedActivations& x, size_t rows, const Weights& weights, float* result, const Parallel& parallel);

// Returns GELU(x W^T + b), quantized for the next layer, in memory that the calling thread keeps. Missing rows of the
// last tile are undefined.
QuantizedActivations gemm_gelu(
    const QuantizedActivations& x, size_t rows, const Weights& weights, const ActivationQuantization& quantization,
    const Parallel& parallel);

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

// 16 scales from `index` on, zero where the mask is.
[[gnu::always_inline]] inline __m512 load_scales(const Weights& weights, size_t index, __mmask16 mask) {
    if (!weights.half_scales) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(weights.scales) + index);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(weights.scales) + index));
}

#pragma GCC pop_options

}  // namespace fusion_edge
