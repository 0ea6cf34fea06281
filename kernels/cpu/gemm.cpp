#include "gemm.h"

#include <vector>

#include "gemm_kernels.h"
#include "tier.h"

namespace fusion_edge {
namespace {

// AMX's tiles are for static quantization.
const GemmKernels& kernels(const Weights& weights) {
    return tier() == Tier::AMX && weights.static_quantization ? AMX_GEMM : VNNI_GEMM;
}

}  // namespace

void gemm(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    if (rows > 1) return kernels(weights).gemm(x, rows, weights, activation, result, parallel);
    gemv(quantize_activations(x, rows, 1, weights, activation, parallel), weights, result, parallel);
}

void mlp(
    const float* x, size_t rows, const Weights& up, const Weights& down, float* result, const Parallel& parallel) {
    if (rows > 1) return kernels(up).mlp(x, rows, up, down, result, parallel);
    std::vector<float> hidden(up.outputs);
    gemm(x, rows, up, Activation::NONE, hidden.data(), parallel);
    gemm(hidden.data(), rows, down, Activation::GELU, result, parallel);
}

}  // namespace fusion_edge
