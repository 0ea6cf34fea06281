// Products of float rows with weights of 4 or 8 bits, in integers: what ONNX Runtime's MatMulNBits computes at accuracy
// level 4, from the very bytes that it reads.
//
// Each row of inputs is rounded to int8, one scale a block of weights; a block's product is a sum of int32. Or of weights
// and inputs whose rounding was settled when the model was calibrated.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fusion_edge {

// Calls its function with every number below a count, by several threads.
using Parallel = std::function<void(size_t count, const std::function<void(size_t)>& body)>;

// How inputs are rounded if it was settled before: round(x / scale) + zero_point, from 0 to 255.
struct GivenRounding {
    float scale;
    int32_t zero_point;
};

// What inputs go through first.
enum class Activation { NONE, GELU };

// The weight [outputs, inputs] of a product, as MatMulNBits has it.
struct Weights {
    size_t outputs, inputs;
    int bits;           // 4 or 8
    size_t block_size;  // inputs that share a scale: 16, 32, 64, 128 or 256; or all, a multiple of 4
    // [outputs, blocks, block_size * bits / 8]; of two in a byte, the first is the low half.
    const uint8_t* values;
    const void* scales;          // [outputs, blocks], float32 or float16
    const uint8_t* zero_points;  // [outputs, blocks * bits / 8, rounded up], or null: 2^(bits - 1)
    const float* bias;           // [outputs], or null unless the rounding of inputs was given
    bool half_scales;            // whether the scales are float16
    const GivenRounding* given;  // of inputs, or null; then the values are int8 [outputs, inputs], a row is a block

    size_t blocks() const { return (inputs + block_size - 1) / block_size; }
    size_t row_bytes() const { return given ? inputs : blocks() * block_size * bits / 8; }
    size_t zero_point_bytes() const { return (blocks() * bits + 7) / 8; }
};

// result [rows, outputs] = activation of x [rows, inputs] times the transposed weight, plus the bias.
void multiply(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel);

// Whether products of one row read weights in several streams: what it was until now, where the processor is quickest so
// at first.
bool use_streams(bool wanted);

// result [rows, outputs of second] = second product of the GELU of the first, both of inputs whose rounding was given. Of
// many rows the first is stored rounded alone.
void multiply_twice(
    const float* x, size_t rows, const Weights& first, const Weights& second, float* result, const Parallel& parallel);

}  // namespace fusion_edge
