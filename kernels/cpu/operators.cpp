// The operators of this library, as ONNX Runtime calls them. Each has the name of one of its own, or of a function of
// the bundle's graphs (kernels/cpu_functions.py, export/lowering/int8_cache.py), and takes its place.

#include <limits>
#include <mutex>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "attention_operators.h"
#include "operator.h"
#include "products.h"

namespace fusion_edge {
namespace {

// MatMulNBits: x, values, scales, zero points, group indices, bias -> product. GeluMatMulNBits: of the GELU of x.
template <ElementType SCALES, Activation ACTIVATION = Activation::NONE>
struct MatMulNBits {
    using Scale = std::conditional_t<SCALES == FLOAT16, uint16_t, float>;
    Weights weights{};

    static constexpr const char* NAME = ACTIVATION == Activation::GELU ? "GeluMatMulNBits" : "MatMulNBits";
    static constexpr size_t INPUTS = 6, OUTPUTS = 1, REQUIRED_INPUTS = 3;
    static ElementType input_type(size_t index) {
        constexpr ElementType types[] = {FLOAT, UINT8, SCALES, UINT8, INT32, FLOAT};
        return types[index];
    }

    static ElementType output_type(size_t) { return FLOAT; }

    explicit MatMulNBits(const Attributes& attributes) {
        weights.outputs = attributes.count("N");
        weights.inputs = attributes.count("K");
        const int64_t bits = attributes.integer("bits", 4), block_size = attributes.integer("block_size", 0);
        expect(bits == 4 || bits == 8, NAME, "expected weights of 4 or 8 bits.");
        expect(
            16 <= block_size && block_size <= 256 && (block_size & (block_size - 1)) == 0,
            NAME, "expected a block_size of 16, 32, 64, 128 or 256.");
        weights.bits = int(bits);
        weights.block_size = block_size;
        weights.half_scales = SCALES == FLOAT16;
    }

    void compute(Context& context) const {
        std::vector<int64_t> shape = context.shape(0);
        expect(!shape.empty() && size_t(shape.back()) == weights.inputs, NAME, "K is not the input's width.");
        expect(!context.has_input(4), NAME, "group indices are not supported.");
        // Whether an input is left out is not asked of its data: a tensor of no value need not have any.
        const auto has = [&](size_t index, size_t count) { return context.count(index) == count; };
        expect(has(1, weights.outputs * weights.row_bytes()), NAME, "the weight's values are not N * K.");
        expect(has(2, weights.outputs * weights.blocks()), NAME, "expected a scale for each block.");
        expect(
            !context.has_input(3) || has(3, weights.outputs * weights.zero_point_bytes()),
            NAME, "expected a zero point for each block.");
        expect(!context.has_input(5) || has(5, weights.outputs), NAME, "expected N values of the bias.");
        Weights own = weights;
        own.values = context.input<uint8_t>(1);
        own.scales = context.input<Scale>(2);
        own.zero_points = context.input<uint8_t>(3);
        own.bias = context.input<float>(5);
        const size_t rows = context.count(0) / weights.inputs;
        shape.back() = weights.outputs;
        float* result = context.output<float>(0, shape);
        if (rows) multiply(context.input<float>(0), rows, own, ACTIVATION, result, context.parallel());
    }
};

// Weights of which both sides are integers, from an operator's inputs on: values, scales, scale and zero point of what is
// multiplied with them, bias. `given` must live as long as they.
constexpr size_t INTEGER_INPUTS = 5;
constexpr ElementType integer_input_type(size_t index) {
    constexpr ElementType types[INTEGER_INPUTS] = {INT8, FLOAT16, FLOAT, UINT8, FLOAT};
    return types[index % INTEGER_INPUTS];
}

// A sum of 32 bits holds as many products of a weight and an input less its zero point, each 128 * 255 at the most.
constexpr int64_t MOST_INTEGER_PRODUCTS = std::numeric_limits<int32_t>::max() / (128 * 255);

// Rounder computes with a scale's inverse and with 256 times the scale: both are finite from here to there.
constexpr float SMALLEST_SCALE = std::numeric_limits<float>::min();
constexpr float LARGEST_SCALE = std::numeric_limits<float>::max() / 256;

Weights integer_weights(Context& context, size_t index, int64_t inputs, const char* node, GivenRounding& given) {
    const std::vector<int64_t> values = context.shape(index);
    expect(
        values.size() == 2 && inputs == values[1] && inputs > 0, node,
        "expected x [..., inputs] and values [outputs, inputs].");
    if (inputs > MOST_INTEGER_PRODUCTS)
        refuse(
            node, std::to_string(inputs) + " inputs; expected up to " + std::to_string(MOST_INTEGER_PRODUCTS) +
                      ", whose sum fits 32 bits.");
    const size_t outputs = values[0];
    expect(context.count(index + 1) == outputs, node, "expected a scale for each output.");
    expect(
        context.count(index + 2) == 1 && context.count(index + 3) == 1, node, "expected one scale and zero point of x.");
    expect(context.count(index + 4) == outputs, node, "expected a bias for each output.");
    given = {*context.input<float>(index + 2), *context.input<uint8_t>(index + 3)};
    expect(
        given.scale >= SMALLEST_SCALE && given.scale <= LARGEST_SCALE, node,
        "expected a scale of x above 0, which is neither tiny nor huge.");
    Weights weights{};
    weights.outputs = outputs;
    weights.inputs = inputs;
    weights.bits = 8;
    weights.block_size = (weights.inputs + 3) / 4 * 4;
    weights.values = context.input<uint8_t>(index);
    weights.scales = context.input<uint16_t>(index + 1);
    weights.half_scales = true;
    weights.bias = context.input<float>(index + 4);
    weights.given = &given;
    return weights;
}

// IntegerProduct: x, weights -> product. GeluIntegerProduct: of the GELU of x.
template <Activation ACTIVATION>
struct IntegerProduct {
    static constexpr const char* NAME = ACTIVATION == Activation::GELU ? "GeluIntegerProduct" : "IntegerProduct";
    static constexpr size_t INPUTS = 1 + INTEGER_INPUTS, OUTPUTS = 1, REQUIRED_INPUTS = INPUTS;
    static ElementType input_type(size_t index) { return index ? integer_input_type(index - 1) : FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit IntegerProduct(const Attributes&) {}

    void compute(Context& context) const {
        std::vector<int64_t> shape = context.shape(0);
        GivenRounding given;
        const Weights weights = integer_weights(context, 1, shape.empty() ? 0 : shape.back(), NAME, given);
        const size_t rows = context.count(0) / weights.inputs;
        shape.back() = weights.outputs;
        float* result = context.output<float>(0, shape);
        if (rows) multiply(context.input<float>(0), rows, weights, ACTIVATION, result, context.parallel());
    }
};

// IntegerMlp: x, weights of the first product, weights of the second -> second product of the GELU of the first.
struct IntegerMlp {
    static constexpr const char* NAME = "IntegerMlp";
    static constexpr size_t INPUTS = 1 + 2 * INTEGER_INPUTS, OUTPUTS = 1, REQUIRED_INPUTS = INPUTS;
    static ElementType input_type(size_t index) { return index ? integer_input_type(index - 1) : FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit IntegerMlp(const Attributes&) {}

    void compute(Context& context) const {
        std::vector<int64_t> shape = context.shape(0);
        GivenRounding of_first, of_second;
        const Weights first = integer_weights(context, 1, shape.empty() ? 0 : shape.back(), NAME, of_first);
        const Weights second = integer_weights(context, 1 + INTEGER_INPUTS, first.outputs, NAME, of_second);
        const size_t rows = context.count(0) / first.inputs;
        shape.back() = second.outputs;
        float* result = context.output<float>(0, shape);
        if (rows) multiply_twice(context.input<float>(0), rows, first, second, result, context.parallel());
    }
};

// An activation function: x -> y, of the same shape.
template <typename Function>
void compute_values(Context& context, Function function) {
    const size_t count = context.count(0);
    float* result = context.output<float>(0, context.shape(0));
    if (count) function(context.input<float>(0), count, result, context.parallel());
}

// QuickGelu: x -> x / (1 + e^(-alpha x)).
struct QuickGelu {
    float alpha;

    static constexpr const char* NAME = "QuickGelu";
    static constexpr size_t INPUTS = 1, OUTPUTS = 1, REQUIRED_INPUTS = 1;
    static ElementType input_type(size_t) { return FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit QuickGelu(const Attributes& attributes) : alpha(attributes.number("alpha", 1.702f)) {}

    void compute(Context& context) const {
        compute_values(context, [this](const float* x, size_t count, float* result, const Parallel& parallel) {
            swish(x, count, alpha, result, parallel);
        });
    }
};

// SwiGlu: gate, up -> gate / (1 + e^-gate) * up.
struct SwiGlu {
    static constexpr const char* NAME = "SwiGlu";
    static constexpr size_t INPUTS = 2, OUTPUTS = 1, REQUIRED_INPUTS = 2;
    static ElementType input_type(size_t) { return FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit SwiGlu(const Attributes&) {}

    void compute(Context& context) const {
        expect(context.shape(0) == context.shape(1), NAME, "expected gate and up of the same shape.");
        const float* up = context.input<float>(1);
        compute_values(context, [up](const float* gate, size_t count, float* result, const Parallel& parallel) {
            swiglu(gate, up, count, result, parallel);
        });
    }
};

// FastGelu: x, bias -> GELU of x.
struct FastGelu {
    static constexpr const char* NAME = "FastGelu";
    static constexpr size_t INPUTS = 2, OUTPUTS = 1, REQUIRED_INPUTS = 1;
    static ElementType input_type(size_t) { return FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit FastGelu(const Attributes&) {}

    void compute(Context& context) const {
        expect(!context.has_input(1), NAME, "a bias is not supported.");
        compute_values(context, gelu);
    }
};

CustomOpDomain* domain(const char* name, const std::vector<const CustomOp*>& operators) {
    CustomOpDomain* created = nullptr;
    check(api->create_custom_op_domain(name, &created));
    for (const CustomOp* op : operators) check(api->custom_op_domain_add(created, op));
    return created;
}

// Those that take the place of ONNX Runtime's own. Bundles hold functions instead of some of them, but for those that
// were exported before there were any.
std::vector<const CustomOp*> contributed() {
    static const CustomOp product = custom_op<MatMulNBits<FLOAT>>();
    static const CustomOp quick_gelu = custom_op<QuickGelu>(), fast_gelu = custom_op<FastGelu>();
    std::vector<const CustomOp*> operators = attention_operators();
    operators.insert(operators.end(), {&product, &quick_gelu, &fast_gelu});
    return operators;
}

// Those that take the place of functions.
std::vector<const CustomOp*> functions() {
    static const CustomOp product = custom_op<MatMulNBits<FLOAT16>>(), swiglu = custom_op<SwiGlu>();
    static const CustomOp of_gelu = custom_op<MatMulNBits<FLOAT16, Activation::GELU>>();
    static const CustomOp integers = custom_op<IntegerProduct<Activation::NONE>>();
    static const CustomOp integers_of_gelu = custom_op<IntegerProduct<Activation::GELU>>();
    static const CustomOp mlp = custom_op<IntegerMlp>();
    std::vector<const CustomOp*> operators = attention_functions();
    operators.insert(operators.end(), {&product, &of_gelu, &integers, &integers_of_gelu, &mlp, &swiglu});
    return operators;
}

}  // namespace
}  // namespace fusion_edge

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether this processor runs these operators.
EXPORTED bool is_supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

// As of attention_operators.h: for tests, which prove the algorithm by its float32 form.
EXPORTED void use_bfloat16(bool wanted) { fusion_edge::use_bfloat16(wanted); }

// As of products.h: for tests, which prove either way on every processor.
EXPORTED bool use_streams(bool wanted) { return fusion_edge::use_streams(wanted); }

// What ONNX Runtime calls when the library is registered for a session.
EXPORTED onnxruntime::Status* RegisterCustomOps(
    onnxruntime::SessionOptions* options, const onnxruntime::ApiBase* base) {
    using namespace fusion_edge;
    static std::vector<CustomOpDomain*> domains;  // for all sessions
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!api) api = base->get_api(API_VERSION);
    if (!api) return base->get_api(1)->create_status(FAIL, "ONNX Runtime 1.23 or newer is needed.");
    return guarded("fusion-edge's kernels", [&] {
        if (domains.empty()) domains = {domain("com.microsoft", contributed()), domain("fusion_edge", functions())};
        for (CustomOpDomain* domain : domains) check(api->add_custom_op_domain(options, domain));
    });
}
