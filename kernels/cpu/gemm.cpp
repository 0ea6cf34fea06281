#include "gemm.h"

#include <vector>

#include "gemm_kernels.h"
#include "tier.h"

namespace fusion_edge {
namespace {

const GemmKernels& kernels() { return tier() == Tier::AMX ? AMX_GEMM : VNNI_GEMM; }

}  // namespace

void gemm(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    if (rows > 1) return kernels().gemm(x, rows, weights, activation, result, parallel);
    gemv(quantize_activations(x, rows, 1, weights, activation, parallel), weights, result, parallel);
}

void mlp(
    const float* x, size_t rows, const Weights& up, const Weights& down, float* result, const Parallel& parallel) {
    if (rows > 1) return kernels().mlp(x, rows, up, down, result, parallel);
    std::vector<float> hidden(up.outputs);
    gemm(x, rows, up, Activation::NONE, hidden.data(), parallel);
    gemm(hidden.data(), rows, down, Activation::GELU, result, parallel);
}

}  // namespace fusion_edge
