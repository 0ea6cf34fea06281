// Attention operators: rotary embedding, the KV cache, and the choice of an attention kernel.

#pragma once

#include "attention_decode.h"
#include "attention_flash.h"

namespace fusion_edge::SIMD {

constexpr size_t ROWS_AHEAD = 16;     // of a prefetch
constexpr size_t PART_MULTIPLE = 32;  // rows of a part: whole tiles of AMX
constexpr float MIN_BIAS = -1e38f;    // keeps differences of scores finite

// Rotary embedding: rotates the pair of channels (i, i + rotary / 2) by the angle with cos[i] and sin[i].
inline void rotate(const float* from, size_t width, size_t rotary, const float* cos, const float* sin, float* to) {
    const size_t half = rotary / 2;
    for (size_t i = 0; i < half; i += LANES) {
        const size_t count = half - i;
        const Floats x = load(from + i, count), y = load(from + half + i, count);
        const Floats c = load(cos + i, count), s = load(sin + i, count);
        store(to + i, fms(x, c, mul(y, s)), count);
        store(to + half + i, fma(y, c, mul(x, s)), count);
    }
    std::copy(from + rotary, from + width, to + rotary);
}

// to = from * scale * scales; null scales are 1.
inline void scale_row(const float* from, size_t width, float scale, const float* scales, float* to) {
    for (size_t i = 0; i < width; i += LANES) {
        Floats product = mul(load(from + i, width - i), broadcast(scale));
        if (scales) product = mul(product, load(scales + i, width - i));
        store(to + i, product, width - i);
    }
}

inline void write_row(const float* from, size_t width, const float*, float* to) { std::copy(from, from + width, to); }

// Quantizes to int8: rounds to nearest even, saturates.
inline void write_row(const float* from, size_t width, const float* scales, int8_t* to) {
    const Floats limit = broadcast(128);
    for (size_t i = 0; i < width; i += LANES) {
        const Floats value = div(load(from + i, width - i), load(scales + i, width - i));
        const Floats near = max(min(value, limit), sub(broadcast(0), limit));
        store_int8(to + i, to_ints(near), width - i);
    }
}

// Rows of one head are far apart in the packed qkv, so the hardware prefetcher misses them.
inline void prefetch_row(const float* row, size_t width) {
    for (size_t i = 0; i < width; i += LANES) __builtin_prefetch(row + i);
    __builtin_prefetch(row + width - 1);
}

// Copies a head's cached keys or values to the present cache and zeroes it after `total`. No-op if both share memory.
template <typename T>
void copy_past(const T* past, size_t past_length, size_t total, size_t capacity, size_t width, T* present) {
    if (past == present) return;
    std::copy(past, past + past_length * width, present);
    std::fill(present + total * width, present + capacity * width, T(0));
}

// Rows of the packed query, key and value.
template <typename T>
class Tokens {
  public:
    explicit Tokens(const CausalParams<T>& params)
        : params_(params),
          row_width_((params.heads + 2 * params.kv_heads) * params.width),
          past_(params.total - params.length) {}

    // Token `index` from `channel` on.
    const float* channels(size_t index, size_t channel) const {
        const float* row = params_.qkv + index * row_width_ + channel;
        if (index + ROWS_AHEAD < params_.length) prefetch_row(row + ROWS_AHEAD * row_width_, params_.width);
        return row;
    }
    void rotated(size_t index, size_t channel, float* to) const {
        const size_t angle = (past_ + index) * params_.rotary / 2;
        rotate(
            channels(index, channel), params_.width, params_.rotary, params_.cos + angle, params_.sin + angle, to);
    }

  private:
    const CausalParams<T>& params_;
    size_t row_width_, past_;
};

// Writes a head's new keys and values to `keys` and `values`, after those of the past.
template <typename T>
KvHead<T> extend_cache(const CausalParams<T>& params, size_t kv_head, T* keys, T* values) {
    const size_t width = params.width, past = params.total - params.length;
    const float* key_scales = params.key_scales ? params.key_scales + kv_head * width : nullptr;
    const float* value_scales = params.value_scales ? params.value_scales + kv_head * width : nullptr;
    const size_t past_offset = kv_head * params.past_capacity * width;
    copy_past(params.past_keys + past_offset, past, params.total, params.capacity, width, keys);
    copy_past(params.past_values + past_offset, past, params.total, params.capacity, width, values);
    const Tokens<T> tokens(params);
    for (size_t i = 0; i < params.length; ++i) {
        float key[MAX_HEAD_WIDTH];
        tokens.rotated(i, (params.heads + kv_head) * width, key);
        write_row(key, width, key_scales, keys + (past + i) * width);
        const float* value = tokens.channels(i, (params.heads + params.kv_heads + kv_head) * width);
        write_row(value, width, value_scales, values + (past + i) * width);
    }
    return {keys, values, params.total, width, width, nullptr, value_scales};
}

// Query rows [length, query heads of the KV head].
template <typename T>
QueryRows query_rows(const CausalParams<T>& params, size_t kv_head) {
    const size_t width = params.width, group = params.heads / params.kv_heads, past = params.total - params.length;
    const float* key_scales = params.key_scales ? params.key_scales + kv_head * width : nullptr;
    QueryRows rows{};
    rows.count = params.length * group;
    rows.query = [=, &params, tokens = Tokens<T>(params)](size_t row, float* query) {
        tokens.rotated(row / group, (kv_head * group + row % group) * width, query);
        scale_row(query, width, params.scale * LOG2_E, key_scales, query);
    };
    rows.visible = [=](size_t row) { return past + row / group + 1; };
    rows.result = [=, &params](size_t row) {
        return params.result + (row / group * params.heads + kv_head * group + row % group) * width;
    };
    return rows;
}

// Parts of each head's rows: one where heads keep all threads busy.
inline size_t parts_per_head(size_t heads, size_t rows) {
    constexpr size_t MIN_ROWS = 64;
    return std::clamp<size_t>((balanced_tasks() + heads - 1) / heads, 1, std::max<size_t>(rows / MIN_ROWS, 1));
}

// Sizes of heads that attend together.
struct HeadSizes {
    size_t heads, rows, keys, width;
};

// make_head(i) makes keys and values ready and returns their KvHead<T>; make_rows(i) returns the head's query rows.
template <class Flash, typename T, typename MakeHead, typename MakeRows>
void attend_heads(
    const HeadSizes& sizes, Precision precision, const Parallel& parallel, MakeHead make_head, MakeRows make_rows) {
    const FlashKernel<T>& kernel = Flash::template kernel<T>(precision);
    const size_t parts = parts_per_head(sizes.heads, sizes.rows);
    const size_t bytes = round_up(kernel.packed_bytes(sizes.keys, sizes.width), 64);
    if (parts == 1)
        return parallel(sizes.heads, [&](size_t index) {
            // Declared where its threads pass: elsewhere they would use it, but not free it when they end.
            static thread_local Scratch<uint8_t> memory;
            const KvHead<T> head = make_head(index);
            uint8_t* const packed = memory.of(bytes);
            kernel.pack(head, packed);
            kernel.attend(head, packed, make_rows(index), 0, sizes.rows);
        });
    static thread_local Scratch<uint8_t> memory;
    static thread_local Scratch<KvHead<T>> head_memory;
    uint8_t* const packed = memory.of(sizes.heads * bytes);
    KvHead<T>* const heads = head_memory.of(sizes.heads);
    parallel(sizes.heads, [&](size_t index) {
        heads[index] = make_head(index);
        kernel.pack(heads[index], packed + index * bytes);
    });
    const size_t part_rows = round_up((sizes.rows + parts - 1) / parts, PART_MULTIPLE);
    parallel(sizes.heads * parts, [&](size_t task) {
        // The last rows first: with a causal mask they take longest.
        const size_t index = task % sizes.heads, first = (parts - 1 - task / sizes.heads) * part_rows;
        if (first >= sizes.rows) return;
        const size_t end = std::min(sizes.rows, first + part_rows);
        kernel.attend(heads[index], packed + index * bytes, make_rows(index), first, end);
    });
}

template <class Flash, typename T, typename MakeHead>
void attend_causal(
    const CausalParams<T>& params, Precision precision, const Parallel& parallel, MakeHead make_head) {
    const auto make_rows = [&](size_t kv_head) { return query_rows(params, kv_head); };
    if (params.length == 1)
        return parallel(params.kv_heads, [&](size_t index) { decode_attention(make_head(index), make_rows(index)); });
    const size_t rows = params.length * (params.heads / params.kv_heads);
    const HeadSizes sizes{params.kv_heads, rows, params.total, params.width};
    attend_heads<Flash, T>(sizes, precision, parallel, make_head, make_rows);
}

// Writes the scales of a head's channels, its quantized rows, and after them the past's content.
inline void quantize_cache(
    const float* rows, const CausalParams<int8_t>& params, const CacheQuantization& quantization, float* scales,
    const int8_t* past, int8_t* cache) {
    const size_t count = params.length, width = params.width;
    for (size_t i = 0; i < width; i += LANES) {
        Floats largest = broadcast(0);
        for (size_t row = 0; row < count; ++row)
            largest = max_abs(largest, load(rows + row * width + i, width - i));
        const Floats fitting = mul(largest, broadcast(quantization.factor));
        // max returns its second operand if either is NaN, so NaN reaches the scale.
        store(scales + i, max(broadcast(quantization.smallest), fitting), width - i);
    }
    for (size_t row = 0; row < count; ++row) write_row(rows + row * width, width, scales, cache + row * width);
    if (past != cache) std::copy(past + count * width, past + params.capacity * width, cache + count * width);
}

template <class Flash>
void attend(const MultiHeadParams& params, Precision precision, const Parallel& parallel) {
    static thread_local Scratch<float> memory;
    const size_t width = params.width, row_width = params.heads * width, keys = params.batch * params.keys;
    float* const biases = params.key_mask ? memory.of(keys) : nullptr;
    const float masked = std::max(params.masked * LOG2_E, MIN_BIAS);
    for (size_t i = 0; params.key_mask && i < keys; ++i) biases[i] = params.key_mask[i] ? 0 : masked;
    const auto make_head = [&, biases](size_t index) -> KvHead<float> {
        const size_t first = index / params.heads * params.keys, channel = index % params.heads * width;
        const size_t offset = first * params.stride + channel;
        const float* const bias = biases ? biases + first : nullptr;
        return {params.k + offset, params.v + offset, params.keys, width, params.stride, bias, nullptr};
    };
    const auto make_rows = [&](size_t index) {
        const size_t first = index / params.heads * params.query_rows, channel = index % params.heads * width;
        QueryRows rows{};
        rows.count = params.queries;
        rows.query = [=, &params](size_t row, float* to) {
            const float* from = params.q + (first + row) * params.stride + channel;
            if (row + ROWS_AHEAD < params.queries) prefetch_row(from + ROWS_AHEAD * params.stride, width);
            scale_row(from, width, params.scale * LOG2_E, nullptr, to);
        };
        rows.visible = [=, &params](size_t) { return params.keys; };
        rows.result = [=, &params](size_t row) { return params.result + (first + row) * row_width + channel; };
        return rows;
    };
    const HeadSizes sizes{params.batch * params.heads, params.queries, params.keys, width};
    attend_heads<Flash, float>(sizes, precision, parallel, make_head, make_rows);
}

inline void fill_with_mean(const MultiHeadParams& params, const Parallel& parallel) {
    const size_t row_width = params.heads * params.width;
    if (params.query_rows == params.queries) return;
    parallel(params.batch, [&](size_t batch) {
        const float* values = params.v + batch * params.keys * params.stride;
        float* const first_row = params.result + (batch * params.query_rows + params.queries) * row_width;
        for (size_t i = 0; i < row_width; i += LANES) {
            const size_t count = row_width - i;
            Floats sum = broadcast(0);
            for (size_t key = 0; key < params.keys; ++key)
                sum = add(sum, load(values + key * params.stride + i, count));
            sum = div(sum, broadcast(float(params.keys)));
            for (size_t row = 0; row < params.query_rows - params.queries; ++row)
                store(first_row + row * row_width + i, sum, count);
        }
    });
}

template <class Flash, typename T>
void attend(const CausalParams<T>& params, Precision precision, const Parallel& parallel) {
    attend_causal<Flash>(params, precision, parallel, [&](size_t kv_head) {
        const size_t offset = kv_head * params.capacity * params.width;
        return extend_cache(params, kv_head, params.keys + offset, params.values + offset);
    });
}

template <class Flash>
void prefill_int8_cache(
    const CausalParams<int8_t>& params, const CacheQuantization& quantization, Precision precision,
    const Parallel& parallel) {
    CausalParams<float> floats{};
    floats.qkv = params.qkv;
    floats.cos = params.cos;
    floats.sin = params.sin;
    floats.result = params.result;
    floats.length = floats.total = floats.capacity = params.length;
    floats.heads = params.heads;
    floats.kv_heads = params.kv_heads;
    floats.width = params.width;
    floats.rotary = params.rotary;
    floats.scale = params.scale;
    attend_causal<Flash>(floats, precision, parallel, [&](size_t kv_head) {
        static thread_local Scratch<float> memory;
        float* const keys = memory.of(2 * params.length * params.width);
        float* const values = keys + params.length * params.width;
        const KvHead<float> head = extend_cache(floats, kv_head, keys, values);
        const size_t offset = kv_head * params.capacity * params.width, channel = kv_head * params.width;
        quantize_cache(
            keys, params, quantization, quantization.keys + channel, params.past_keys + offset, params.keys + offset);
        quantize_cache(
            values, params, quantization, quantization.values + channel, params.past_values + offset,
            params.values + offset);
        return head;
    });
}

}  // namespace fusion_edge::SIMD
