#include "products_parts.h"

namespace fusion_edge {

void multiply(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    const bool is_row = rows == 1 && !weights.given;
    const Rounded rounded = round(x, rows, is_row ? 1 : TILE_ROWS, weights, activation, parallel);
    if (is_row) multiply_row(rounded, weights, result, parallel);
    else multiply_rows(rounded, rows, weights, result, parallel);
}

}  // namespace fusion_edge
