#include "gemm.h"

#include <vector>

#include "gemm_kernels.h"

namespace fusion_edge {

void gemm(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    const size_t tile_rows = rows == 1 ? 1 : TILE_ROWS;
    const QuantizedActivations quantized = quantize_activations(x, rows, tile_rows, weights, activation, parallel);
    if (rows == 1) gemv(quantized, weights, result, parallel);
    else gemm_tiles(quantized, rows, weights, result, parallel);
}

void mlp(
    const float* x, size_t rows, const Weights& up, const Weights& down, float* result, const Parallel& parallel) {
    if (rows == 1) {
        std::vector<float> hidden(up.outputs);
        gemm(x, rows, up, Activation::NONE, hidden.data(), parallel);
        return gemm(hidden.data(), rows, down, Activation::GELU, result, parallel);
    }
    const QuantizedActivations inputs = quantize_activations(x, rows, TILE_ROWS, up, Activation::NONE, parallel);
    gemm_tiles(gemm_gelu(inputs, rows, up, *down.static_quantization, parallel), rows, down, result, parallel);
}

}  // namespace fusion_edge
