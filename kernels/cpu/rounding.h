// Rows of inputs, rounded to int8.

#pragma once

#include "products.h"

namespace fusion_edge {

constexpr size_t STEP = 4;       // inputs that an instruction multiplies and adds in each lane
constexpr size_t TILE_ROWS = 8;  // with three registers of outputs: 24 of the 32 registers are sums

// A tile of so many rows lies side by side: by turns four inputs of each, so that a product reads one stream. Of every 8
// values, those of even places come before those of odd ones if weights have 4 bits, as the halves of the weights' bytes
// do.
struct Rounded {
    int8_t* values;  // [tiles, steps, rows of a tile, 4], zero behind the last input
    float* scales;   // [tiles, blocks, rows of a tile]
    int32_t* sums;   // [tiles, blocks, rows of a tile]: minus the sum of the values, times the zero point if all have one
    size_t steps, blocks;

    // A tile of so many rows.
    Rounded tile(size_t index, size_t rows) const {
        return {
            values + index * steps * rows * STEP, scales + index * blocks * rows, sums + index * blocks * rows, steps,
            blocks};
    }
};

// Rows [rows, inputs] in tiles of one or of TILE_ROWS, in memory that the calling thread keeps; missing rows of the last
// tile are not filled.
Rounded round(
    const float* x, size_t rows, size_t of_tile, const Weights& weights, Activation activation,
    const Parallel& parallel);

}  // namespace fusion_edge
