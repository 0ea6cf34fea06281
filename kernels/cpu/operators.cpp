// The operators of this library, as ONNX Runtime calls them. Each has the name of one of its own and takes its place.

#include <mutex>
#include <vector>

#include "attention_operators.h"
#include "operator.h"
#include "products.h"

namespace fusion_edge {
namespace {

// MatMulNBits: x, values, scales, zero points, group indices, bias -> product.
struct MatMulNBits {
    Weights weights{};

    static constexpr const char* NAME = "MatMulNBits";
    static constexpr size_t INPUTS = 6, OUTPUTS = 1, REQUIRED_INPUTS = 3;
    static ElementType input_type(size_t index) {
        constexpr ElementType types[] = {FLOAT, UINT8, FLOAT, UINT8, INT32, FLOAT};
        return types[index];
    }

    static ElementType output_type(size_t) { return FLOAT; }

    explicit MatMulNBits(const Attributes& attributes) {
        weights.outputs = attributes.integer("N", 0);
        weights.inputs = attributes.integer("K", 0);
        weights.bits = int(attributes.integer("bits", 4));
        weights.block_size = attributes.integer("block_size", 0);
        expect(weights.bits == 4 || weights.bits == 8, "MatMulNBits: expected weights of 4 or 8 bits.");
    }

    void compute(Context& context) const {
        std::vector<int64_t> shape = context.shape(0);
        expect(!shape.empty() && size_t(shape.back()) == weights.inputs, "MatMulNBits: K is not the input's width.");
        Weights own = weights;
        own.values = context.input<uint8_t>(1);
        own.scales = context.input<float>(2);
        own.zero_points = context.input<uint8_t>(3);
        own.bias = context.input<float>(5);
        expect(!context.input<int32_t>(4), "MatMulNBits: group indices are not supported.");
        size_t rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
        shape.back() = weights.outputs;
        float* result = context.output<float>(0, shape);
        if (rows) multiply(context.input<float>(0), rows, own, result, context.parallel());
    }
};

}  // namespace
}  // namespace fusion_edge

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether this processor runs these operators.
EXPORTED bool is_supported() { return fusion_edge::is_supported(); }

// As of attention_operators.h: for tests, which prove the algorithm by its float32 form.
EXPORTED void use_bfloat16(bool wanted) { fusion_edge::use_bfloat16(wanted); }

// What ONNX Runtime calls when the library is registered for a session.
EXPORTED onnxruntime::Status* RegisterCustomOps(
    onnxruntime::SessionOptions* options, const onnxruntime::ApiBase* base) {
    using namespace fusion_edge;
    static const CustomOp product = custom_op<MatMulNBits>();
    static CustomOpDomain* domain = nullptr;  // one for all sessions
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    api = base->get_api(API_VERSION);
    if (!api) return base->get_api(1)->create_status(FAIL, "ONNX Runtime 1.23 or newer is needed.");
    return guarded([&] {
        if (!domain) {
            CustomOpDomain* created = nullptr;
            check(api->create_custom_op_domain("com.microsoft", &created));
            check(api->custom_op_domain_add(created, &product));
            for (const CustomOp* op : attention_operators()) check(api->custom_op_domain_add(created, op));
            domain = created;
        }
        check(api->add_custom_op_domain(options, domain));
    });
}
