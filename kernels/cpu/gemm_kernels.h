// Kernels of linear layers: GEMV for one row, GEMMs of each tier for more.

#pragma once

#include "quantize_activations.h"
#include "simd.h"

namespace fusion_edge {

constexpr size_t CHUNK = 64;  // bytes of weights in one register

// result [outputs] of one row.
void gemv(const QuantizedActivations& x, const Weights& weights, float* result, const Parallel& parallel);

// Signatures of gemm.h.
using Gemm = decltype(&gemm);
using Mlp = decltype(&mlp);

// GEMMs of a tier, for more than one row.
struct GemmKernels {
    Gemm gemm;
    Mlp mlp;
};

extern const GemmKernels VNNI_GEMM, AMX_GEMM;

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

// 16 scales from `index` on, zero where the mask is.
[[gnu::always_inline]] inline __m512 load_scales(const Weights& weights, size_t index, __mmask16 mask) {
    if (!weights.half_scales) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(weights.scales) + index);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(weights.scales) + index));
}

#pragma GCC pop_options

}  // namespace fusion_edge
