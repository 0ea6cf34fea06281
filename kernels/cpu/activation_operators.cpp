#include "custom_op.h"
#include "kernels.h"
#include "operators.h"

namespace fusion_edge {
namespace {

// Computes y = function(x), of the shape of x.
template <typename Function>
void compute_elements(Context& context, Function function) {
    const size_t count = context.count(0);
    float* result = context.output<float>(0, context.shape(0));
    if (count) function(context.input<float>(0), count, result, context.parallel());
}

// QuickGelu: x -> x / (1 + e^(-alpha x)).
struct QuickGelu : FloatOperator<1> {
    static constexpr const char* NAME = "QuickGelu";
    float alpha;

    explicit QuickGelu(const Attributes& attributes) : alpha(attributes.number("alpha", 1.702f)) {}

    void compute(Context& context) const {
        compute_elements(context, [this](const float* x, size_t count, float* result, const Parallel& parallel) {
            kernels()->swish(x, count, alpha, result, parallel);
        });
    }
};

// FastGelu: x, bias (not supported) -> GELU(x).
struct FastGelu : FloatOperator<2, 1> {
    static constexpr const char* NAME = "FastGelu";

    explicit FastGelu(const Attributes&) {}

    void compute(Context& context) const {
        expect(!context.has_input(1), NAME, "a bias is not supported.");
        compute_elements(context, [](const float* x, size_t count, float* result, const Parallel& parallel) {
            kernels()->gelu(x, count, result, parallel);
        });
    }
};

// SwiGlu: gate, up -> SiLU(gate) * up.
struct SwiGlu : FloatOperator<2> {
    static constexpr const char* NAME = "SwiGlu";

    explicit SwiGlu(const Attributes&) {}

    void compute(Context& context) const {
        expect(context.shape(0) == context.shape(1), NAME, "expected gate and up of the same shape.");
        const float* up = context.input<float>(1);
        compute_elements(context, [up](const float* gate, size_t count, float* result, const Parallel& parallel) {
            kernels()->swiglu(gate, up, count, result, parallel);
        });
    }
};

}  // namespace

Operators contributed_activation_operators() {
    static const CustomOp quick_gelu = custom_op<QuickGelu>(), fast_gelu = custom_op<FastGelu>();
    return {&quick_gelu, &fast_gelu};
}

Operators activation_operators() {
    static const CustomOp swiglu = custom_op<SwiGlu>();
    return {&swiglu};
}

}  // namespace fusion_edge
