// Operands of linear layers with weights of 4 or 8 bits, in integer arithmetic: x W^T + b.
//
// Weights have the layout of ONNX Runtime's MatMulNBits. Activations are quantized to 8 bits in one of two ways:
// - dynamically: int8, symmetric, one scale per row and block of weights, as at accuracy level 4 of MatMulNBits. AMX's
//   blocks have 256 inputs or more (amx/panels.h);
// - statically: uint8, with one scale and zero point from calibration.
// Sums of products are int32, and float32 across blocks.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fusion_edge {

// Static quantization of activations: clamp(round(x / scale) + zero_point, 0, 255).
struct ActivationQuantization {
    float scale;
    int32_t zero_point;
};

// Function applied to the activations before quantization.
enum class Activation { NONE, GELU };

// Weight [outputs, inputs] of a linear layer (N and K of MatMulNBits).
struct Weights {
    size_t outputs, inputs;
    int bits;           // 4 or 8
    size_t block_size;  // inputs that share a scale: 16, 32, 64, 128 or 256; or all, a multiple of 4
    // [outputs, blocks, block_size * bits / 8]. Of two values in a byte, the low half is the first.
    const uint8_t* values;
    const void* scales;          // [outputs, blocks], float32 or float16
    const uint8_t* zero_points;  // [outputs, ceil(blocks * bits / 8)]; null: 2^(bits - 1) everywhere
    const float* bias;           // [outputs]; null: none. Required with static quantization.
    bool half_scales;            // whether the scales are float16
    // Null: dynamic quantization. Otherwise values are int8 [outputs, inputs] and a row is one block.
    const ActivationQuantization* static_quantization;

    size_t blocks() const { return (inputs + block_size - 1) / block_size; }
    size_t row_bytes() const { return static_quantization ? inputs : blocks() * block_size * bits / 8; }
    size_t zero_point_bytes() const { return (blocks() * bits + 7) / 8; }
    uint8_t zero_point(size_t output, size_t block) const {
        const uint8_t* row = zero_points + output * zero_point_bytes();
        return bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
    }
};

}  // namespace fusion_edge
