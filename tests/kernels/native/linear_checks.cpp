#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"

namespace fusion_edge::checks {
namespace {

// Weights with random values, and what they stand for.
struct Layer {
    Weights weights{};
    std::vector<uint8_t> values, zero_points;
    std::vector<float> scales, bias;
    std::vector<uint16_t> half_scales;
    ActivationQuantization quantization{};

    double scale(size_t output, size_t block) const { return scales[output * weights.blocks() + block]; }
    // Value of an input without its zero point.
    int value(size_t output, size_t input) const {
        const size_t at = output * weights.row_bytes() + input * weights.bits / 8;
        if (weights.static_quantization) return int8_t(values[at]);
        const int unsigned_value = weights.bits == 8 ? values[at] : values[at] >> (input % 2 * 4) & 15;
        return unsigned_value - zero_point(output, input / weights.block_size);
    }
    int zero_point(size_t output, size_t block) const {
        if (!weights.zero_points) return 1 << (weights.bits - 1);
        const uint8_t* row = zero_points.data() + output * weights.zero_point_bytes();
        return weights.bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
    }
    double bias_of(size_t output) const { return weights.bias ? bias[output] : 0; }
};

// Sets the scales, random multiples of 2^-16 below 2^-6: float16 holds them too.
void set_scales(Layer& layer, Random& random, size_t count, bool half) {
    layer.scales.resize(count);
    layer.half_scales.resize(count);
    for (size_t i = 0; i < count; ++i) {
        const uint16_t mantissa = uint16_t(random.integer(0, 1023)), exponent = uint16_t(random.integer(3, 8));
        layer.half_scales[i] = uint16_t(exponent << 10 | mantissa);
        layer.scales[i] = std::ldexp(float(1024 + mantissa), exponent - 25);
    }
    layer.weights.half_scales = half;
    layer.weights.scales = half ? static_cast<const void*>(layer.half_scales.data()) : layer.scales.data();
}

Layer dynamic_layer(
    Random& random, size_t inputs, size_t outputs, int bits, size_t block_size, bool zero_points, bool bias,
    bool half) {
    Layer layer;
    layer.weights.inputs = inputs;
    layer.weights.outputs = outputs;
    layer.weights.bits = bits;
    layer.weights.block_size = block_size;
    layer.values = random.bytes(outputs * layer.weights.row_bytes());
    layer.weights.values = layer.values.data();
    layer.zero_points = random.bytes(outputs * layer.weights.zero_point_bytes());
    layer.weights.zero_points = zero_points ? layer.zero_points.data() : nullptr;
    layer.bias = random.normals(outputs);
    layer.weights.bias = bias ? layer.bias.data() : nullptr;
    set_scales(layer, random, outputs * layer.weights.blocks(), half);
    return layer;
}

constexpr size_t FEW_ROWS = 4;  // that are multiplied by GEMV

// A layer with 4-bit weights as AMX multiplies it: int8, with one scale for an output and a superblock of inputs.
// Ratios of scales are multiples of 2^-11.
Layer requantized(const Layer& layer) {
    constexpr size_t SUPERBLOCK = 256;
    constexpr int RATIO_BITS = 11;
    const Weights& from = layer.weights;
    const size_t shared = SUPERBLOCK / from.block_size;
    Layer result;
    result.weights = from;
    result.weights.bits = 8;
    result.weights.block_size = SUPERBLOCK;
    result.weights.zero_points = nullptr;
    result.bias = layer.bias;
    const size_t blocks = result.weights.blocks();
    result.values.assign(from.outputs * blocks * SUPERBLOCK, 128);
    result.scales.assign(from.outputs * blocks, 0);
    for (size_t output = 0; output < from.outputs; ++output) {
        float* const scales = result.scales.data() + output * blocks;
        for (size_t block = 0; block < from.blocks(); ++block) {
            const int zero = layer.zero_point(output, block), levels = 127 / std::max(zero, 15 - zero);
            const float scale = std::abs(float(layer.scale(output, block)) * (1 / float(levels)));
            scales[block / shared] = std::max(scales[block / shared], scale);
        }
        for (size_t input = 0; input < from.inputs; ++input) {
            const size_t block = input / from.block_size;
            const float ratio = float(layer.scale(output, block)) / scales[block / shared];
            const int steps = layer.value(output, input) * 16 * int(std::nearbyint(ratio * (1 << RATIO_BITS)));
            result.values[output * blocks * SUPERBLOCK + input] = uint8_t(((steps + (1 << 14)) >> 15) + 128);
        }
    }
    return result;
}

// `layer` points to its own quantization, so it must not move.
void make_static(Layer& layer, Random& random, size_t inputs, size_t outputs, float scale) {
    layer.weights.inputs = inputs;
    layer.weights.outputs = outputs;
    layer.weights.bits = 8;
    layer.weights.block_size = (inputs + 3) / 4 * 4;
    layer.quantization = {scale, int32_t(random.integer(0, 255))};
    layer.weights.static_quantization = &layer.quantization;
    layer.values = random.bytes(outputs * inputs);
    layer.weights.values = layer.values.data();
    layer.bias = random.normals(outputs);
    layer.weights.bias = layer.bias.data();
    set_scales(layer, random, outputs, true);
}

// Activations after quantization. `doubts`: 1 where an inexact activation may be rounded to another integer; else 0.
struct Quantized {
    std::vector<int> values, doubts;
    std::vector<double> scales;  // [rows, blocks]
    double error = 0;            // relative, of the scales

    // Adds the rounded quotient, limited.
    void add(double quotient, double quotient_error, int low, int high) {
        const double rounded = std::nearbyint(quotient);
        values.push_back(std::clamp(int(rounded), low, high));
        doubts.push_back(quotient_error > 0 && std::abs(std::abs(quotient - rounded) - 0.5) <= quotient_error);
    }
};

// Activations [rows, inputs] and the error of each.
struct Activations {
    std::vector<float> values;
    std::vector<double> exact, errors;

    Activations(const std::vector<float>& x, Activation activation) {
        for (const float value : x) {
            const bool is_gelu = activation == Activation::GELU;
            exact.push_back(is_gelu ? gelu(value) : value);
            errors.push_back(is_gelu ? gate_error(value) : 0);
            values.push_back(float(exact.back()));
        }
    }
    explicit Activations(const Expected& sums) {  // GELU of the sums; its slope is below 1.13
        for (size_t i = 0; i < sums.values.size(); ++i) {
            exact.push_back(gelu(sums.values[i]));
            errors.push_back(gate_error(sums.values[i]) + 1.13 * sums.tolerances[i]);
            values.push_back(float(exact.back()));
        }
    }
};

Quantized quantize(const Activations& x, const Weights& weights) {
    Quantized quantized;
    const size_t rows = x.values.size() / weights.inputs;
    if (const ActivationQuantization* fixed = weights.static_quantization) {
        for (size_t i = 0; i < x.values.size(); ++i) {
            // In float32, as ONNX defines it, unless the activation itself is inexact.
            const double quotient = x.errors[i] > 0 ? x.exact[i] / fixed->scale : x.values[i] / fixed->scale;
            const double error = x.errors[i] > 0 ? x.errors[i] / fixed->scale + 4 * ROUNDOFF * std::abs(quotient) : 0;
            quantized.add(std::clamp(quotient, -1e6, 1e6), error, -fixed->zero_point, 255 - fixed->zero_point);
        }
        quantized.scales.assign(rows, fixed->scale);
        return quantized;
    }
    for (size_t row = 0; row < rows; ++row)
        for (size_t start = 0; start < weights.inputs; start += weights.block_size) {
            const size_t end = std::min(weights.inputs, start + weights.block_size), first = row * weights.inputs;
            float magnitude = 0;
            double largest_error = 0;
            for (size_t i = first + start; i < first + end; ++i) {
                magnitude = std::max(magnitude, std::abs(x.values[i]));
                largest_error = std::max(largest_error, x.errors[i]);
            }
            if (magnitude < 1e-30f) magnitude = 0;
            const float inverse = magnitude > 0 ? 127 / magnitude : 0;
            for (size_t i = first + start; i < first + end; ++i) {
                const double error = largest_error > 0 ? 2 * 127 * largest_error / magnitude + 300 * ROUNDOFF : 0;
                quantized.add(x.values[i] * inverse, error, -127, 127);
            }
            quantized.error = std::max(quantized.error, magnitude > 0 ? largest_error / magnitude : 0);
            quantized.scales.push_back(magnitude / 127);
        }
    return quantized;
}

// x W^T + bias. Integer sums of a block are exact. They are converted to float32, multiplied with the product of two
// scales, and added up over blocks, registers and the bias. Kernels may correct zero points apart, of up to 2^bits.
Expected multiply(const Quantized& x, const Layer& layer) {
    const Weights& weights = layer.weights;
    const size_t rows = x.values.size() / weights.inputs, blocks = weights.blocks();
    const double roundings = double(blocks) + 8;
    const int zero_points = weights.static_quantization ? 0 : 1 << weights.bits;
    Expected expected;
    for (size_t row = 0; row < rows; ++row)
        for (size_t output = 0; output < weights.outputs; ++output) {
            double sum = 0, magnitude = 0, doubt = 0;
            for (size_t block = 0; block < blocks; ++block) {
                const size_t start = block * weights.block_size;
                int64_t block_sum = 0, block_magnitude = 0, block_doubt = 0;
                for (size_t input = start; input < std::min(weights.inputs, start + weights.block_size); ++input) {
                    const size_t i = row * weights.inputs + input;
                    const int weight = layer.value(output, input);
                    block_sum += x.values[i] * weight;
                    block_magnitude += std::abs(x.values[i]) * (std::abs(weight) + 2 * zero_points);
                    block_doubt += x.doubts[i] * std::abs(weight);
                }
                const double scale = layer.scale(output, block) * x.scales[row * blocks + block];
                sum += double(block_sum) * scale;
                magnitude += double(block_magnitude) * scale;
                doubt += double(block_doubt) * scale;
            }
            const double bias = layer.bias_of(output);
            const double error = roundings * ROUNDOFF * (magnitude + std::abs(bias)) + magnitude * x.error;
            expected.add(sum + bias, error + doubt + 1e-37);
        }
    return expected;
}

bool is_requantized(const Checks& checks, const Layer& layer, size_t rows) {
    const bool has_groups = layer.weights.bits == 4 && layer.weights.block_size < 256;
    return has_groups && rows > FEW_ROWS && std::strcmp(checks.kernels.tier(), "AMX") == 0;
}

std::string describe(const Layer& layer, size_t rows, Activation activation) {
    const Weights& weights = layer.weights;
    std::string text = weights.static_quantization ? "static int8"
                                                   : "int" + std::to_string(weights.bits) + ":" +
                                                         std::to_string(weights.block_size);
    if (weights.zero_points) text += ", zero points";
    if (weights.half_scales) text += ", float16 scales";
    if (weights.bias) text += ", bias";
    if (activation == Activation::GELU) text += ", GELU";
    return text + ", " + std::to_string(rows) + " x " + std::to_string(weights.inputs) + " x " +
           std::to_string(weights.outputs);
}

void check(Checks& checks, Random& random, const Layer& layer, size_t rows, Activation activation) {
    std::vector<float> x = random.normals(rows * layer.weights.inputs), result(rows * layer.weights.outputs);
    if (layer.weights.static_quantization) x.front() = random.integer(0, 1) ? 1e30f : -1e30f;
    const std::string name = describe(layer, rows, activation);
    const auto run = [&](const Parallel& parallel) {
        checks.kernels.gemm(x.data(), rows, layer.weights, activation, result.data(), parallel);
    };
    const bool streams = use_streams(false);
    checks.run(name, result, run);
    if (rows <= FEW_ROWS) {
        const std::vector<float> of_one_stream = result;
        use_streams(true);
        run(run_serially);
        checks.expect(result == of_one_stream, name + ", in streams");
    }
    use_streams(streams);
    const Layer used = is_requantized(checks, layer, rows) ? requantized(layer) : layer;
    checks.expect_near(name, result.data(), multiply(quantize({x, activation}, used.weights), used));
}

void check_dynamic(Checks& checks) {
    size_t seed = 0;
    for (const int bits : {4, 8})
        for (const size_t block_size : {16, 32, 64, 128, 256})
            for (const bool zero_points : {false, true})
                for (const size_t rows : {1, 2, 3, 5, 6, 8, 14}) {
                    Random random(uint32_t(++seed));
                    const size_t inputs = random.integer(1, 500), outputs = random.integer(1, 90);
                    const Layer layer = dynamic_layer(
                        random, inputs, outputs, bits, block_size, zero_points, seed & 1, seed >> 1 & 1);
                    check(checks, random, layer, rows, seed % 5 ? Activation::NONE : Activation::GELU);
                }
    Random random(0);
    for (const size_t rows : {70, 500}) {  // several blocks of rows and inputs
        check(checks, random, dynamic_layer(random, 1100, 270, 4, 128, true, true, true), rows, Activation::NONE);
        check(checks, random, dynamic_layer(random, 600, 90, 8, 32, true, true, true), rows, Activation::NONE);
    }
    for (const int bits : {4, 8}) {  // several panels for a thread
        const Layer layer = dynamic_layer(random, 96, 1600, bits, 32, true, true, true);
        check(checks, random, layer, 13, Activation::NONE);
    }
}

void check_static(Checks& checks) {
    for (const size_t rows : {1, 2, 3, 7, 8, 17})
        for (const Activation activation : {Activation::NONE, Activation::GELU})
            for (const size_t inputs : {1, 9, 64, 130, 516}) {
                Random random(uint32_t(rows * 1000 + inputs));
                Layer layer;
                make_static(layer, random, inputs, random.integer(1, 90), 0.02f);
                check(checks, random, layer, rows, activation);
            }
}

void check_mlp(Checks& checks) {
    for (const size_t rows : {1, 2, 6, 13, 16})
        for (const size_t width : {5, 72, 300}) {
            Random random(uint32_t(rows * 1000 + width));
            const size_t hidden = random.integer(1, 200), outputs = random.integer(1, 90);
            Layer up, down;
            make_static(up, random, width, hidden, 0.02f);
            for (float& bias : up.bias) bias *= 10;
            make_static(down, random, hidden, outputs, 0.2f);
            const std::vector<float> x = random.normals(rows * width);
            std::vector<float> result(rows * outputs);
            const std::string name = "mlp, " + std::to_string(rows) + " x " + std::to_string(width) + " x " +
                                     std::to_string(hidden) + " x " + std::to_string(outputs);
            checks.run(name, result, [&](const Parallel& parallel) {
                checks.kernels.mlp(x.data(), rows, up.weights, down.weights, result.data(), parallel);
            });
            const Expected sums = multiply(quantize({x, Activation::NONE}, up.weights), up);
            checks.expect_near(name, result.data(), multiply(quantize(Activations(sums), down.weights), down));
        }
}

// The largest magnitudes everywhere, of which few fit an int16 sum.
void check_extremes(Checks& checks) {
    for (const int bits : {4, 8})
        for (const float sign : {1.0f, -1.0f}) {
            Random random(7);
            Layer layer = dynamic_layer(random, 256, 20, bits, 128, false, false, false);
            std::fill(layer.values.begin(), layer.values.end(), uint8_t(255));
            const std::vector<float> x(9 * 256, sign);
            std::vector<float> result(9 * 20);
            checks.kernels.gemm(x.data(), 9, layer.weights, Activation::NONE, result.data(), run_serially);
            const Layer used = is_requantized(checks, layer, 9) ? requantized(layer) : layer;
            const Expected expected = multiply(quantize({x, Activation::NONE}, used.weights), used);
            checks.expect_near("extremes of " + std::to_string(bits) + " bits", result.data(), expected);
        }
}

// A row with NaN or an infinity becomes NaN; others stay.
void check_not_finite(Checks& checks) {
    Random random(1);
    const Layer layer = dynamic_layer(random, 70, 20, 4, 32, true, true, true);
    for (const size_t rows : {1, 9})
        for (const float value : {NAN, INFINITY, -INFINITY}) {
            std::vector<float> x = random.normals(rows * 70), result(rows * 20);
            x[(rows - 1) * 70 + 69] = value;
            checks.kernels.gemm(x.data(), rows, layer.weights, Activation::NONE, result.data(), run_serially);
            for (size_t i = 0; i < rows; ++i)
                checks.expect(
                    std::isnan(result[i * 20]) == (i + 1 == rows),
                    "row " + std::to_string(i) + " of " + std::to_string(rows) + " with " + std::to_string(value));
        }
}

}  // namespace

void check_linear_layers(Checks& checks) {
    check_dynamic(checks);
    check_static(checks);
    check_mlp(checks);
    check_extremes(checks);
    check_not_finite(checks);
}

}  // namespace fusion_edge::checks
