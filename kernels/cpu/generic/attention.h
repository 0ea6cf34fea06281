// Attention operators: rotary embedding, the KV cache, and the choice of an attention kernel.

#pragma once

#include "attention_decode.h"
#include "attention_flash.h"

namespace fusion_edge::SIMD {

constexpr size_t ROWS_AHEAD = 16;   // of a prefetch
constexpr float MIN_BIAS = -1e38f;  // keeps differences of scores finite

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

// Attention of one KV head with all its query heads. Writes the head's new keys and values to `keys` and `values`.
template <typename T>
void attend_head(const CausalParams<T>& params, size_t kv_head, T* keys, T* values, Precision precision) {
    const size_t width = params.width, group = params.heads / params.kv_heads, past = params.total - params.length;
    const size_t row_width = (params.heads + 2 * params.kv_heads) * width, half = params.rotary / 2;
    const float* key_scales = params.key_scales ? params.key_scales + kv_head * width : nullptr;
    const float* value_scales = params.value_scales ? params.value_scales + kv_head * width : nullptr;
    // Returns token `index` of qkv from `channel` on.
    const auto channels = [&](size_t index, size_t channel) {
        const float* row = params.qkv + index * row_width + channel;
        if (index + ROWS_AHEAD < params.length) prefetch_row(row + ROWS_AHEAD * row_width, width);
        return row;
    };
    const auto rotated = [&](size_t index, size_t channel, float* to) {
        const size_t angle = (past + index) * half;
        rotate(channels(index, channel), width, params.rotary, params.cos + angle, params.sin + angle, to);
    };
    const size_t past_offset = kv_head * params.past_capacity * width;
    copy_past(params.past_keys + past_offset, past, params.total, params.capacity, width, keys);
    copy_past(params.past_values + past_offset, past, params.total, params.capacity, width, values);
    for (size_t i = 0; i < params.length; ++i) {
        float key[MAX_HEAD_WIDTH];
        rotated(i, (params.heads + kv_head) * width, key);
        write_row(key, width, key_scales, keys + (past + i) * width);
        const float* value = channels(i, (params.heads + params.kv_heads + kv_head) * width);
        write_row(value, width, value_scales, values + (past + i) * width);
    }
    QueryRows rows{};
    rows.count = params.length * group;
    rows.query = [&](size_t row, float* query) {
        rotated(row / group, (kv_head * group + row % group) * width, query);
        scale_row(query, width, params.scale * LOG2_E, key_scales, query);
    };
    rows.visible = [&](size_t row) { return past + row / group + 1; };
    rows.result = [&](size_t row) {
        return params.result + (row / group * params.heads + kv_head * group + row % group) * width;
    };
    const KvHead<T> head{keys, values, params.total, width, width, nullptr, value_scales};
    if (params.length == 1) decode_attention(head, rows);
    else flash_attention(head, rows, precision);
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

inline void attend(const MultiHeadParams& params, Precision precision, const Parallel& parallel) {
    const size_t width = params.width, row_width = params.heads * width;
    parallel(params.batch * params.heads, [&](size_t index) {
        static thread_local Scratch<float> biases;
        const size_t batch = index / params.heads, channel = index % params.heads * width;
        const int32_t* mask = params.key_mask ? params.key_mask + batch * params.keys : nullptr;
        float* bias = mask ? biases.of(params.keys) : nullptr;
        const float masked = std::max(params.masked * LOG2_E, MIN_BIAS);
        for (size_t i = 0; mask && i < params.keys; ++i) bias[i] = mask[i] ? 0 : masked;
        const size_t key = batch * params.keys * params.stride + channel, query = batch * params.query_rows;
        const KvHead<float> head{params.k + key, params.v + key, params.keys, width, params.stride, bias, nullptr};
        QueryRows rows{};
        rows.count = params.queries;
        rows.query = [&](size_t row, float* to) {
            const float* from = params.q + (query + row) * params.stride + channel;
            if (row + ROWS_AHEAD < params.queries) prefetch_row(from + ROWS_AHEAD * params.stride, width);
            scale_row(from, width, params.scale * LOG2_E, nullptr, to);
        };
        rows.visible = [&](size_t) { return params.keys; };
        rows.result = [&](size_t row) { return params.result + (query + row) * row_width + channel; };
        flash_attention(head, rows, precision);
    });
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
            for (size_t key = 0; key < params.keys; ++key) sum = add(sum, load(values + key * params.stride + i, count));
            sum = div(sum, broadcast(float(params.keys)));
            for (size_t row = 0; row < params.query_rows - params.queries; ++row)
                store(first_row + row * row_width + i, sum, count);
        }
    });
}

template <typename T>
void attend(const CausalParams<T>& params, Precision precision, const Parallel& parallel) {
    parallel(params.kv_heads, [&](size_t kv_head) {
        const size_t offset = kv_head * params.capacity * params.width;
        attend_head(params, kv_head, params.keys + offset, params.values + offset, precision);
    });
}

inline void prefill_int8_cache(
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
    parallel(params.kv_heads, [&](size_t kv_head) {
        static thread_local Scratch<float> memory;
        float* const keys = memory.of(2 * params.length * params.width);
        float* const values = keys + params.length * params.width;
        attend_head(floats, kv_head, keys, values, precision);
        const size_t offset = kv_head * params.capacity * params.width, channel = kv_head * params.width;
        quantize_cache(
            keys, params, quantization, quantization.keys + channel, params.past_keys + offset, params.keys + offset);
        quantize_cache(
            values, params, quantization, quantization.values + channel, params.past_values + offset,
            params.values + offset);
    });
}

}  // namespace fusion_edge::SIMD
