#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_rows.h"
#include "lanes.h"

namespace fusion_edge {
namespace {

constexpr float LOG2_E = 1.44269504f;   // e^x = 2^(x log2 e)
constexpr float LOWEST_BIAS = -1e38f;   // above the lowest float, so that differences of scores are finite

// Turns channels i and i + rotary / 2 by the angle whose cosine and sine stand at i.
void rotate(const float* from, size_t width, size_t rotary, const float* cos, const float* sin, float* to) {
    const size_t half = rotary / 2;
    for (size_t i = 0; i < half; ++i) {
        to[i] = from[i] * cos[i] - from[i + half] * sin[i];
        to[i + half] = from[i + half] * cos[i] + from[i] * sin[i];
    }
    std::copy(from + rotary, from + width, to + rotary);
}

void write_row(const float* from, size_t width, const float*, float* to) { std::copy(from, from + width, to); }

void write_row(const float* from, size_t width, const float* scales, int8_t* to) {
    for (size_t i = 0; i < width; ++i)
        to[i] = int8_t(std::nearbyint(std::clamp(from[i] / scales[i], -128.0f, 127.0f)));
}

// A head's keys or values before this call's positions, where they are not there already; zeros behind the last one.
template <typename T>
void keep_past(const T* past, size_t past_length, size_t total, size_t capacity, size_t width, T* present) {
    if (past == present) return;
    std::copy(past, past + past_length * width, present);
    std::fill(present + total * width, present + capacity * width, T(0));
}

// One head of keys and values with all its query heads.
template <typename T>
void attend_head(const Causal<T>& all, size_t kv_head, Factors factors) {
    const size_t width = all.width, group = all.heads / all.kv_heads, past = all.total - all.length;
    const size_t row_width = (all.heads + 2 * all.kv_heads) * width, half = all.rotary / 2;
    const float* key_scales = all.key_scales ? all.key_scales + kv_head * width : nullptr;
    const float* value_scales = all.value_scales ? all.value_scales + kv_head * width : nullptr;
    const auto rotated = [&](size_t index, size_t channel, float* to) {
        const size_t angle = (past + index) * half;
        rotate(all.qkv + index * row_width + channel, width, all.rotary, all.cos + angle, all.sin + angle, to);
    };
    T* const keys = all.keys + kv_head * all.capacity * width;
    T* const values = all.values + kv_head * all.capacity * width;
    keep_past(all.past_keys + kv_head * all.past_capacity * width, past, all.total, all.capacity, width, keys);
    keep_past(all.past_values + kv_head * all.past_capacity * width, past, all.total, all.capacity, width, values);
    for (size_t i = 0; i < all.length; ++i) {
        float key[LARGEST_HEAD];
        rotated(i, (all.heads + kv_head) * width, key);
        write_row(key, width, key_scales, keys + (past + i) * width);
        const float* value = all.qkv + i * row_width + (all.heads + all.kv_heads + kv_head) * width;
        write_row(value, width, value_scales, values + (past + i) * width);
    }
    Rows rows{};
    rows.count = all.length * group;
    rows.query = [&](size_t row, float* query) {
        rotated(row / group, (kv_head * group + row % group) * width, query);
        for (size_t i = 0; i < width; ++i) query[i] *= all.scale * LOG2_E * (key_scales ? key_scales[i] : 1);
    };
    rows.visible = [&](size_t row) { return past + row / group + 1; };
    rows.result = [&](size_t row) {
        return all.result + (row / group * all.heads + kv_head * group + row % group) * width;
    };
    const Head<T> head{keys, values, all.total, width, width, nullptr, value_scales};
    if (all.length == 1) attend_in_stream(head, rows);
    else attend_in_tiles(head, rows, factors);
}

}  // namespace

void attend(const MultiHead& all, Factors factors, const Parallel& parallel) {
    const size_t width = all.width, row_width = all.heads * width;
    parallel(all.batch * all.heads, [&](size_t index) {
        static thread_local Scratch<float> biases;
        const size_t batch = index / all.heads, channel = index % all.heads * width;
        const int32_t* mask = all.key_mask ? all.key_mask + batch * all.keys : nullptr;
        float* bias = mask ? biases.of(all.keys) : nullptr;
        const float masked = std::max(all.masked * LOG2_E, LOWEST_BIAS);
        for (size_t i = 0; mask && i < all.keys; ++i) bias[i] = mask[i] ? 0 : masked;
        const size_t key = batch * all.keys * row_width + channel, query = batch * all.queries * row_width + channel;
        const Head<float> head{all.k + key, all.v + key, all.keys, width, row_width, bias, nullptr};
        Rows rows{};
        rows.count = all.queries;
        rows.query = [&](size_t row, float* to) {
            for (size_t i = 0; i < width; ++i) to[i] = all.q[query + row * row_width + i] * (all.scale * LOG2_E);
        };
        rows.visible = [&](size_t) { return all.keys; };
        rows.result = [&](size_t row) { return all.result + query + row * row_width; };
        attend_in_tiles(head, rows, factors);
    });
}

template <typename T>
void attend(const Causal<T>& attention, Factors factors, const Parallel& parallel) {
    parallel(attention.kv_heads, [&](size_t kv_head) { attend_head(attention, kv_head, factors); });
}

template void attend(const Causal<float>&, Factors, const Parallel&);
template void attend(const Causal<int8_t>&, Factors, const Parallel&);

}  // namespace fusion_edge
