// Activations as AMX's right factor, and how inputs of a linear layer are divided for AMX.

#pragma once

#include "amx.h"
#include "gemm_kernels.h"

namespace fusion_edge {


constexpr size_t SUPERBLOCK = 256;          // inputs of 4-bit weights that share a scale, at least
constexpr size_t INTEGER_SUPERBLOCK = 512;  // inputs that one int32 sum of tiles adds with static quantization

// Division of a layer's inputs into steps, one product of tiles each, and of steps into superblocks.
struct AmxSteps {
    size_t depth;       // inputs of a step
    size_t superblock;  // inputs with one scale of weights and activations
    size_t width;       // all inputs, padded to whole chunks of weights

    explicit AmxSteps(const Weights& weights)
        : superblock(
              weights.static_quantization ? INTEGER_SUPERBLOCK
              : weights.bits == 8         ? weights.block_size
                                          : std::max(weights.block_size, SUPERBLOCK)),
          width(round_up(weights.row_bytes(), CHUNK) * 8 / weights.bits) {
        depth = std::min(superblock, AMX_BYTES);
    }
    size_t superblocks() const { return (width + superblock - 1) / superblock; }
};

// Quantized activations in tiles of 16 rows. Missing rows are undefined, but have scales of 0.
struct AmxRows {
    uint8_t* values;  // [tiles, width / 4, 16, 4], zero after the last input. Of 4-bit weights' chunks, even inputs first.
    float* scales;    // [tiles, superblocks, 16]; undefined with static quantization
    float* sums;      // [tiles, superblocks, 16]: sums of the values, as scales
    size_t width, superblocks;

    uint8_t* tile(size_t index) const { return values + index * width * AMX_ROWS; }
};

// Quantizes x [rows, inputs], in memory that the calling thread keeps.
AmxRows pack_amx_rows(
    const float* x, size_t rows, const Weights& weights, Activation activation, const Parallel& parallel);

// Memory of rows that are written later.
AmxRows allocate_amx_rows(Scratch<uint8_t>& memory, size_t rows, size_t width);

}  // namespace fusion_edge
