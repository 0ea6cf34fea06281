#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <type_traits>

#include "custom_op.h"
#include "kernels.h"

namespace fusion_edge {
namespace {

// Default: bfloat16 where the kernels have it, in half the time of float32. Its error is below that of the 8-bit linear
// layers.
std::atomic<Precision> precision = Precision::BFLOAT16;

using Shape = std::vector<int64_t>;

// Fails unless an attribute is missing or has the supported value.
void expect_supported(const Attributes& attributes, const char* node, const char* name, int64_t expected) {
    const int64_t value = attributes.integer(name, expected);
    if (value != expected) fail(node, std::string(name) + " " + std::to_string(value) + " is not supported.");
}

void expect_width(int64_t width, const char* node) {
    if (width < 1 || size_t(width) > MAX_HEAD_WIDTH)
        fail(
            node, "heads of " + std::to_string(width) + " channels; expected from 1 to " +
                      std::to_string(MAX_HEAD_WIDTH) + ".");
}

// Fails if the node has an input that only ONNX Runtime's own operator supports.
void expect_missing(const Context& context, size_t index, const char* node, const char* name) {
    if (context.has_input(index)) fail(node, std::string(name) + " is not supported.");
}

// MultiHeadAttention: query, key, value, bias, key padding mask, attention bias, past key, past value -> output.
struct MultiHeadAttention {
    int64_t heads;
    float scale, masked;

    static constexpr const char* NAME = "MultiHeadAttention";
    static constexpr size_t INPUTS = 8, OUTPUTS = 1, REQUIRED_INPUTS = 3;
    static ElementType input_type(size_t index) { return index == 4 ? INT32 : FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit MultiHeadAttention(const Attributes& attributes)
        : heads(attributes.count("num_heads")),
          scale(attributes.number("scale", 0)),
          masked(attributes.number("mask_filter_value", -10000)) {
        expect_supported(attributes, NAME, "unidirectional", 0);
    }

    void compute(Context& context) const {
        constexpr const char* NAMES[] = {"", "", "", "bias", "", "attention_bias", "past_key", "past_value"};
        for (size_t i : {3, 5, 6, 7}) expect_missing(context, i, NAME, NAMES[i]);
        const Shape q = context.shape(0), k = context.shape(1), v = context.shape(2);
        expect(
            q.size() == 3 && k.size() == 3 && k == v && q[0] == k[0] && q[2] == k[2] && q[2] % heads == 0,
            NAME, "expected query [batch, queries, heads * width], key and value [batch, keys, heads * width].");
        expect_width(q[2] / heads, NAME);
        if (context.has_input(4))
            expect(context.shape(4) == Shape{k[0], k[1]}, NAME, "expected key_padding_mask [batch, keys].");
        MultiHeadParams params{};
        params.q = context.input<float>(0);
        params.k = context.input<float>(1);
        params.v = context.input<float>(2);
        params.key_mask = context.input<int32_t>(4);
        params.batch = q[0];
        params.queries = q[1];
        params.keys = k[1];
        params.query_rows = q[1];
        params.stride = q[2];
        params.heads = heads;
        params.width = q[2] / heads;
        params.scale = scale ? scale : 1 / std::sqrt(float(params.width));
        params.masked = masked;
        params.result = context.output<float>(0, q);
        if (q[0] == 0 || q[1] == 0) return;
        expect(k[1] > 0, NAME, "expected at least one key.");
        kernels()->attend(params, precision, context.parallel());
    }
};

// PackedAttention: packed query, key and value; key mask -> output. PatchAttention: only the first `patches` rows
// attend, and the others become the mean of all values.
template <bool OF_PATCHES>
struct PackedAttention {
    int64_t heads, patches;
    float masked;

    static constexpr const char* NAME = OF_PATCHES ? "PatchAttention" : "PackedAttention";
    static constexpr size_t INPUTS = 2, OUTPUTS = 1, REQUIRED_INPUTS = 2;
    static ElementType input_type(size_t index) { return index == 1 ? INT32 : FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }

    explicit PackedAttention(const Attributes& attributes)
        : heads(attributes.count("num_heads")),
          patches(OF_PATCHES ? attributes.count("patches") : 0),
          masked(attributes.number("mask_filter_value", -10000)) {}

    void compute(Context& context) const {
        const Shape qkv = context.shape(0);
        expect(
            qkv.size() == 3 && qkv[2] % (3 * heads) == 0 && qkv[1] > 0,
            NAME, "expected qkv [batch, rows, 3 * heads * width].");
        expect(context.shape(1) == Shape{qkv[0], qkv[1]}, NAME, "expected key_mask [batch, rows].");
        expect(patches <= qkv[1], NAME, "expected at least as many rows as patches.");
        const int64_t row_width = qkv[2] / 3;
        expect_width(row_width / heads, NAME);
        MultiHeadParams params{};
        params.q = context.input<float>(0);
        params.k = params.q + row_width;
        params.v = params.k + row_width;
        params.key_mask = context.input<int32_t>(1);
        params.batch = qkv[0];
        params.queries = OF_PATCHES ? patches : qkv[1];
        params.keys = params.query_rows = qkv[1];
        params.stride = qkv[2];
        params.heads = heads;
        params.width = row_width / heads;
        params.scale = 1 / std::sqrt(float(params.width));
        params.masked = masked;
        params.result = context.output<float>(0, {qkv[0], qkv[1], row_width});
        if (qkv[0] == 0) return;
        kernels()->attend(params, precision, context.parallel());
        kernels()->fill_with_mean(params, context.parallel());
    }
};

// Attributes that both causal operators have.
struct CausalAttributes {
    int64_t heads, kv_heads;
    float scale;

    CausalAttributes(const Attributes& attributes, const char* name)
        : heads(attributes.count("num_heads")),
          kv_heads(attributes.count("kv_num_heads")),
          scale(attributes.number("scale", 0)) {
        expect(heads % kv_heads == 0, name, "expected num_heads to be a multiple of kv_num_heads.");
    }
};

// Positions of the inputs that both causal operators have.
struct InputPositions {
    size_t past_key, past_value, last_position, total_length, cos, sin, key_scales, value_scales;
};

// Checks the inputs and returns the parameters, outputs allocated. `with_scales`: whether to read scales of the cache.
template <typename T>
CausalParams<T> causal_params(
    Context& context, const CausalAttributes& attributes, const char* node, const InputPositions& at, bool is_prefill,
    bool with_scales) {
    const Shape qkv = context.shape(0), past = context.shape(at.past_key), cos = context.shape(at.cos);
    const int64_t heads = attributes.heads, kv_heads = attributes.kv_heads;
    expect(
        qkv.size() == 3 && qkv[0] == 1 && qkv[2] % (heads + 2 * kv_heads) == 0,
        node, "expected query [1, length, (num_heads + 2 * kv_num_heads) * width].");
    const int64_t width = qkv[2] / (heads + 2 * kv_heads), length = qkv[1];
    expect(length > 0, node, "expected at least one token.");
    expect_width(width, node);
    expect(
        past.size() == 4 && past == context.shape(at.past_value) && past[0] == 1 && past[1] == kv_heads &&
            past[3] == width,
        node, "expected past_key and past_value [1, kv_num_heads, capacity, width].");
    const int64_t total = context.scalar<int32_t>(at.total_length, "the total length"), before = total - length;
    expect(
        context.scalar<int32_t>(at.last_position, "the last position") == total - 1 && before >= 0 && before <= past[2],
        node, "the last position, the total length and the past's length do not agree.");
    if (is_prefill && (before != 0 || length > past[2]))
        fail(
            node, "a prefill of " + std::to_string(length) + " tokens that end at position " + std::to_string(total) +
                      "; expected to begin at position 0, in a cache of " + std::to_string(past[2]) + ".");
    expect(
        cos.size() == 2 && cos == context.shape(at.sin) && cos[0] >= total && 2 * cos[1] <= width,
        node, "expected cos and sin [positions, rotary channels / 2].");
    CausalParams<T> params{};
    if (with_scales) {
        const Shape scales{1, kv_heads, 1, width};
        for (size_t i : {at.key_scales, at.value_scales})
            expect(
                context.has_input(i) && context.shape(i) == scales,
                node, "expected scales of keys and values [1, kv_num_heads, 1, width].");
        params.key_scales = context.input<float>(at.key_scales);
        params.value_scales = context.input<float>(at.value_scales);
    }
    params.qkv = context.input<float>(0);
    params.past_keys = context.input<T>(at.past_key);
    params.past_values = context.input<T>(at.past_value);
    params.cos = context.input<float>(at.cos);
    params.sin = context.input<float>(at.sin);
    params.length = length;
    params.total = total;
    params.past_capacity = past[2];
    params.capacity = std::max(past[2], total);
    params.heads = heads;
    params.kv_heads = kv_heads;
    params.width = width;
    params.rotary = 2 * cos[1];
    params.scale = attributes.scale ? attributes.scale : 1 / std::sqrt(float(width));
    const Shape present{1, kv_heads, int64_t(params.capacity), width};
    params.result = context.output<float>(0, {1, length, heads * width});
    params.keys = context.output<T>(1, present);
    params.values = context.output<T>(2, present);
    return params;
}

// GroupQueryAttention: packed query, key and value; -, -; past key, past value; last position, total length; cos, sin;
// position ids, attention bias, head sink; key scales, value scales -> output, present key, present value.
template <typename T>
struct GroupQueryAttention {
    static constexpr bool IS_INT8 = std::is_same_v<T, int8_t>;
    CausalAttributes own;

    static constexpr const char* NAME = "GroupQueryAttention";
    static constexpr size_t INPUTS = 14, OUTPUTS = 3, REQUIRED_INPUTS = 1;
    static constexpr ElementType CACHE = IS_INT8 ? INT8 : FLOAT;
    static ElementType input_type(size_t index) {
        constexpr ElementType types[INPUTS] = {FLOAT, FLOAT, FLOAT, CACHE, CACHE, INT32, INT32,
                                               FLOAT, FLOAT, INT64, FLOAT, FLOAT, FLOAT, FLOAT};
        return types[index];
    }
    static ElementType output_type(size_t index) { return index ? CACHE : FLOAT; }

    explicit GroupQueryAttention(const Attributes& attributes) : own(attributes, NAME) {
        expect_supported(attributes, NAME, "local_window_size", -1);
        expect_supported(attributes, NAME, "rotary_interleaved", 0);
        expect_supported(attributes, NAME, "smooth_softmax", 0);
        expect_supported(attributes, NAME, "qk_output", 0);
        expect(attributes.integer("do_rotary", 0) == 1, NAME, "expected do_rotary 1.");
        expect(attributes.number("softcap", 0) == 0, NAME, "softcap is not supported.");
        for (const char* name : {"k_quant_type", "v_quant_type"}) {
            const std::string expected = IS_INT8 ? "PER_CHANNEL" : "NONE", type = attributes.text(name, "NONE");
            if (type != expected) fail(NAME, std::string(name) + " " + type + "; expected " + expected + ".");
        }
        if (IS_INT8) expect_supported(attributes, NAME, "kv_cache_bit_width", 8);
    }

    void compute(Context& context) const {
        constexpr const char* NAMES[] = {"", "key", "value", "", "", "", "", "", "",
                                         "position_ids", "attention_bias", "head_sink", "", ""};
        for (size_t i : {1, 2, 9, 10, 11}) expect_missing(context, i, NAME, NAMES[i]);
        for (size_t i : {3, 4, 5, 6, 7, 8})
            expect(context.has_input(i), NAME, "expected a past, lengths and rotary tables.");
        constexpr InputPositions AT{3, 4, 5, 6, 7, 8, 12, 13};
        kernels()->attend(causal_params<T>(context, own, NAME, AT, false, IS_INT8), precision, context.parallel());
    }
};

// CachedAttention, with an int8 cache: packed query, key and value; past key, past value, their scales; last position,
// total length; cos, sin; is_prefill -> attended, present key, present value, their scales.
struct CachedAttention {
    CausalAttributes own;
    float scale_factor, smallest_scale;

    static constexpr const char* NAME = "CachedAttention";
    static constexpr size_t INPUTS = 10, OUTPUTS = 5, REQUIRED_INPUTS = INPUTS;
    static ElementType input_type(size_t index) {
        constexpr ElementType types[INPUTS] = {FLOAT, INT8, INT8, FLOAT, FLOAT, INT32, INT32, FLOAT, FLOAT, BOOL};
        return types[index];
    }
    static ElementType output_type(size_t index) { return index == 1 || index == 2 ? INT8 : FLOAT; }

    explicit CachedAttention(const Attributes& attributes)
        : own(attributes, NAME),
          scale_factor(attributes.number("scale_factor", 0)),
          smallest_scale(attributes.number("smallest_scale", 0)) {
        expect(
            scale_factor > 0 && smallest_scale > 0,
            NAME, "expected scale_factor and smallest_scale, both above 0.");
    }

    void compute(Context& context) const {
        constexpr InputPositions AT{1, 2, 5, 6, 7, 8, 3, 4};
        // uint8_t: the memory of a bool input may hold any byte.
        const bool is_prefill = context.scalar<uint8_t>(9, "is_prefill");
        const CausalParams<int8_t> params = causal_params<int8_t>(context, own, NAME, AT, is_prefill, true);
        const Shape shape{1, int64_t(params.kv_heads), 1, int64_t(params.width)};
        float* const key_scales = context.output<float>(3, shape);
        float* const value_scales = context.output<float>(4, shape);
        const CacheQuantization quantization{scale_factor, smallest_scale, key_scales, value_scales};
        if (is_prefill) return kernels()->prefill_int8_cache(params, quantization, precision, context.parallel());
        kernels()->attend(params, precision, context.parallel());
        const size_t count = params.kv_heads * params.width;
        std::copy_n(params.key_scales, params.key_scales == key_scales ? 0 : count, key_scales);
        std::copy_n(params.value_scales, params.value_scales == value_scales ? 0 : count, value_scales);
    }
};

}  // namespace

void use_bfloat16(bool enabled) {
    precision = enabled ? Precision::BFLOAT16 : Precision::FLOAT32;
}

Operators contributed_attention_operators() {
    static const CustomOp multi_head = custom_op<MultiHeadAttention>();
    static const CustomOp floats = custom_op<GroupQueryAttention<float>>();
    static const CustomOp integers = custom_op<GroupQueryAttention<int8_t>>();
    return {&multi_head, &floats, &integers};
}

Operators attention_operators() {
    static const CustomOp cached = custom_op<CachedAttention>();
    static const CustomOp packed = custom_op<PackedAttention<false>>(), of_patches = custom_op<PackedAttention<true>>();
    return {&cached, &packed, &of_patches};
}

}  // namespace fusion_edge
