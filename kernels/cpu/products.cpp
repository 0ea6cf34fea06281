#include <vector>

#include "products_parts.h"

namespace fusion_edge {

void multiply(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    const Rounded rounded = round(x, rows, rows == 1 ? 1 : TILE_ROWS, weights, activation, parallel);
    if (rows == 1) multiply_row(rounded, weights, result, parallel);
    else multiply_rows(rounded, rows, weights, result, parallel);
}

void multiply_twice(
    const float* x, size_t rows, const Weights& first, const Weights& second, float* result, const Parallel& parallel) {
    if (rows == 1) {
        std::vector<float> hidden(first.outputs);
        multiply(x, rows, first, Activation::NONE, hidden.data(), parallel);
        return multiply(hidden.data(), rows, second, Activation::GELU, result, parallel);
    }
    const Rounded inputs = round(x, rows, TILE_ROWS, first, Activation::NONE, parallel);
    multiply_rows(multiply_rows_for(inputs, rows, first, *second.given, parallel), rows, second, result, parallel);
}

}  // namespace fusion_edge
