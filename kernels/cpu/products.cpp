#include "products_parts.h"

namespace fusion_edge {

void multiply(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    const Rounded rounded = round(x, rows, rows == 1 ? 1 : TILE_ROWS, weights, activation, parallel);
    if (rows == 1) multiply_row(rounded, weights, result, parallel);
    else multiply_rows(rounded, rows, weights, result, parallel);
}

}  // namespace fusion_edge
