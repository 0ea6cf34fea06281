#include <limits>
#include <type_traits>
#include <vector>

#include "custom_op.h"
#include "kernels.h"
#include "operators.h"

namespace fusion_edge {
namespace {

// Computes the output y [..., outputs] of x [..., inputs] by function(x, rows, y, parallel), if there are rows.
template <typename Function>
void compute_rows(Context& context, size_t inputs, size_t outputs, Function function) {
    std::vector<int64_t> shape = context.shape(0);
    const size_t rows = context.count(0) / inputs;
    shape.back() = outputs;
    float* result = context.output<float>(0, shape);
    if (rows) function(context.input<float>(0), rows, result, context.parallel());
}

// MatMulNBits: x, values, scales, zero points, group indices (not supported), bias -> y. GeluMatMulNBits: of GELU(x).
template <ElementType SCALES, Activation ACTIVATION = Activation::NONE>
struct MatMulNBits : FloatOperator<6, 3> {
    static constexpr const char* NAME = ACTIVATION == Activation::GELU ? "GeluMatMulNBits" : "MatMulNBits";
    using Scale = std::conditional_t<SCALES == FLOAT16, uint16_t, float>;
    Weights shape{};  // without its data

    static ElementType input_type(size_t index) {
        constexpr ElementType types[] = {FLOAT, UINT8, SCALES, UINT8, INT32, FLOAT};
        return types[index];
    }

    explicit MatMulNBits(const Attributes& attributes) {
        shape.outputs = attributes.count("N");
        shape.inputs = attributes.count("K");
        const int64_t bits = attributes.integer("bits", 4), block_size = attributes.integer("block_size", 0);
        expect(bits == 4 || bits == 8, NAME, "expected weights of 4 or 8 bits.");
        expect(
            16 <= block_size && block_size <= 256 && (block_size & (block_size - 1)) == 0,
            NAME, "expected a block_size of 16, 32, 64, 128 or 256.");
        shape.bits = int(bits);
        shape.block_size = block_size;
        shape.half_scales = SCALES == FLOAT16;
    }

    void compute(Context& context) const {
        const std::vector<int64_t> x = context.shape(0);
        expect(!x.empty() && size_t(x.back()) == shape.inputs, NAME, "K is not the input's width.");
        expect(!context.has_input(4), NAME, "group indices are not supported.");
        // An input is missing if has_input is false; the data pointer of an empty tensor may be null, too.
        const auto has = [&](size_t index, size_t count) { return context.count(index) == count; };
        expect(has(1, shape.outputs * shape.row_bytes()), NAME, "the weight's values are not N * K.");
        expect(has(2, shape.outputs * shape.blocks()), NAME, "expected a scale for each block.");
        expect(
            !context.has_input(3) || has(3, shape.outputs * shape.zero_point_bytes()),
            NAME, "expected a zero point for each block.");
        expect(!context.has_input(5) || has(5, shape.outputs), NAME, "expected N values of the bias.");
        Weights weights = shape;
        weights.values = context.input<uint8_t>(1);
        weights.scales = context.input<Scale>(2);
        weights.zero_points = context.input<uint8_t>(3);
        weights.bias = context.input<float>(5);
        const auto run = [&](const float* x, size_t rows, float* result, const Parallel& parallel) {
            kernels()->gemm(x, rows, weights, ACTIVATION, result, parallel);
        };
        compute_rows(context, weights.inputs, weights.outputs, run);
    }
};

// Inputs of a linear layer with static quantization: values, scales, scale of x, zero point of x, bias.
constexpr size_t INTEGER_INPUTS = 5;
constexpr ElementType INTEGER_INPUT_TYPES[INTEGER_INPUTS] = {INT8, FLOAT16, FLOAT, UINT8, FLOAT};

// A term of the int32 sum, weight * (x - zero point), has a magnitude of up to 128 * 255.
constexpr int64_t MAX_INTEGER_INPUTS = std::numeric_limits<int32_t>::max() / (128 * 255);

// ActivationQuantizer computes 1 / scale and 256 * scale: both are finite in this range.
constexpr float MIN_SCALE = std::numeric_limits<float>::min();
constexpr float MAX_SCALE = std::numeric_limits<float>::max() / 256;

// Checks and returns the weights whose inputs start at `index`. They point to `quantization`.
Weights integer_weights(
    Context& context, size_t index, int64_t inputs, const char* node, ActivationQuantization& quantization) {
    const std::vector<int64_t> values = context.shape(index);
    expect(
        values.size() == 2 && inputs == values[1] && inputs > 0, node,
        "expected x [..., inputs] and values [outputs, inputs].");
    if (inputs > MAX_INTEGER_INPUTS)
        fail(
            node, std::to_string(inputs) + " inputs; expected up to " + std::to_string(MAX_INTEGER_INPUTS) +
                      ", whose sum fits 32 bits.");
    const size_t outputs = values[0];
    expect(context.count(index + 1) == outputs, node, "expected a scale for each output.");
    expect(
        context.count(index + 2) == 1 && context.count(index + 3) == 1,
        node, "expected one scale and zero point of x.");
    expect(context.count(index + 4) == outputs, node, "expected a bias for each output.");
    quantization = {*context.input<float>(index + 2), *context.input<uint8_t>(index + 3)};
    expect(
        quantization.scale >= MIN_SCALE && quantization.scale <= MAX_SCALE, node,
        "expected a scale of x above 0, neither tiny nor huge.");
    Weights weights{};
    weights.outputs = outputs;
    weights.inputs = inputs;
    weights.bits = 8;
    weights.block_size = (weights.inputs + 3) / 4 * 4;
    weights.values = context.input<uint8_t>(index);
    weights.scales = context.input<uint16_t>(index + 1);
    weights.half_scales = true;
    weights.bias = context.input<float>(index + 4);
    weights.static_quantization = &quantization;
    return weights;
}

// Operator with x and LAYERS linear layers with static quantization.
template <size_t LAYERS>
struct IntegerOperator : FloatOperator<1 + LAYERS * INTEGER_INPUTS> {
    static ElementType input_type(size_t index) {
        return index ? INTEGER_INPUT_TYPES[(index - 1) % INTEGER_INPUTS] : FLOAT;
    }

  protected:
    static int64_t width(const Context& context) {
        const std::vector<int64_t> x = context.shape(0);
        return x.empty() ? 0 : x.back();
    }
};

// IntegerProduct: x, weights -> y. GeluIntegerProduct: of GELU(x).
template <Activation ACTIVATION>
struct IntegerMatMul : IntegerOperator<1> {
    static constexpr const char* NAME = ACTIVATION == Activation::GELU ? "GeluIntegerProduct" : "IntegerProduct";

    explicit IntegerMatMul(const Attributes&) {}

    void compute(Context& context) const {
        ActivationQuantization quantization;
        const Weights weights = integer_weights(context, 1, width(context), NAME, quantization);
        const auto run = [&](const float* x, size_t rows, float* result, const Parallel& parallel) {
            kernels()->gemm(x, rows, weights, ACTIVATION, result, parallel);
        };
        compute_rows(context, weights.inputs, weights.outputs, run);
    }
};

// IntegerMlp: x, weights of up, weights of down -> down(GELU(up(x))).
struct IntegerMlp : IntegerOperator<2> {
    static constexpr const char* NAME = "IntegerMlp";

    explicit IntegerMlp(const Attributes&) {}

    void compute(Context& context) const {
        ActivationQuantization of_up, of_down;
        const Weights up = integer_weights(context, 1, width(context), NAME, of_up);
        const Weights down = integer_weights(context, 1 + INTEGER_INPUTS, up.outputs, NAME, of_down);
        const auto run = [&](const float* x, size_t rows, float* result, const Parallel& parallel) {
            kernels()->mlp(x, rows, up, down, result, parallel);
        };
        compute_rows(context, up.inputs, down.outputs, run);
    }
};

}  // namespace

Operators contributed_linear_operators() {
    static const CustomOp matmul = custom_op<MatMulNBits<FLOAT>>();
    return {&matmul};
}

Operators linear_operators() {
    static const CustomOp matmul = custom_op<MatMulNBits<FLOAT16>>();
    static const CustomOp gelu_matmul = custom_op<MatMulNBits<FLOAT16, Activation::GELU>>();
    static const CustomOp integer_matmul = custom_op<IntegerMatMul<Activation::NONE>>();
    static const CustomOp gelu_integer_matmul = custom_op<IntegerMatMul<Activation::GELU>>();
    static const CustomOp integer_mlp = custom_op<IntegerMlp>();
    return {&matmul, &gelu_matmul, &integer_matmul, &gelu_integer_matmul, &integer_mlp};
}

}  // namespace fusion_edge
