#include "attention.h"

#include <algorithm>

#include "attention_rows.h"
#include "lanes.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t AHEAD = 16;  // rows: what is fetched early
constexpr float LOWEST_BIAS = -1e38f;   // above the lowest float, so that differences of scores are finite

// Calls its function with the first of 16 values or fewer, and which of them there are.
template <typename Function>
[[gnu::always_inline]] inline void for_lanes(size_t count, Function function) {
    for (size_t i = 0; i < count; i += LANES) function(i, first(count - i));
}

// Turns channels i and i + rotary / 2 by the angle whose cosine and sine stand at i.
void rotate(const float* from, size_t width, size_t rotary, const float* cos, const float* sin, float* to) {
    const size_t half = rotary / 2;
    for_lanes(half, [&](size_t i, __mmask16 mask) __attribute__((always_inline)) {
        const __m512 x = load(from + i, mask), y = load(from + half + i, mask);
        const __m512 c = load(cos + i, mask), s = load(sin + i, mask);
        _mm512_mask_storeu_ps(to + i, mask, _mm512_fmsub_ps(x, c, _mm512_mul_ps(y, s)));
        _mm512_mask_storeu_ps(to + half + i, mask, _mm512_fmadd_ps(y, c, _mm512_mul_ps(x, s)));
    });
    std::copy(from + rotary, from + width, to + rotary);
}

// to = from * scale * scales, which may be null.
void multiply(const float* from, size_t width, float scale, const float* scales, float* to) {
    for_lanes(width, [&](size_t i, __mmask16 mask) __attribute__((always_inline)) {
        __m512 product = _mm512_mul_ps(load(from + i, mask), _mm512_set1_ps(scale));
        if (scales) product = _mm512_mul_ps(product, load(scales + i, mask));
        _mm512_mask_storeu_ps(to + i, mask, product);
    });
}

void write_row(const float* from, size_t width, const float*, float* to) { std::copy(from, from + width, to); }

// Rounds to nearest even; what int8 does not hold becomes its largest or smallest.
void write_row(const float* from, size_t width, const float* scales, int8_t* to) {
    const __m512 limit = _mm512_set1_ps(128);
    for_lanes(width, [&](size_t i, __mmask16 mask) __attribute__((always_inline)) {
        const __m512 value = _mm512_maskz_div_ps(mask, load(from + i, mask), load(scales + i, mask));
        const __m512 near = _mm512_max_ps(_mm512_min_ps(value, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
        _mm_mask_storeu_epi8(to + i, mask, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(near)));
    });
}

// Rows of one head lie far apart in what all heads share: the processor does not foresee them.
void fetch(const float* row, size_t width) {
    for (size_t i = 0; i < width; i += LANES) _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(row + width - 1), _MM_HINT_T0);
}

// A head's keys or values before this call's positions, where they are not there already; zeros behind the last one.
template <typename T>
void keep_past(const T* past, size_t past_length, size_t total, size_t capacity, size_t width, T* present) {
    if (past == present) return;
    std::copy(past, past + past_length * width, present);
    std::fill(present + total * width, present + capacity * width, T(0));
}

// One head of keys and values, which are written to memory of its own, with all its query heads.
template <typename T>
void attend_head(const Causal<T>& all, size_t kv_head, T* keys, T* values, Factors factors) {
    const size_t width = all.width, group = all.heads / all.kv_heads, past = all.total - all.length;
    const size_t row_width = (all.heads + 2 * all.kv_heads) * width, half = all.rotary / 2;
    const float* key_scales = all.key_scales ? all.key_scales + kv_head * width : nullptr;
    const float* value_scales = all.value_scales ? all.value_scales + kv_head * width : nullptr;
    // Channels of one position, from one on.
    const auto channels = [&](size_t index, size_t channel) {
        const float* row = all.qkv + index * row_width + channel;
        if (index + AHEAD < all.length) fetch(row + AHEAD * row_width, width);
        return row;
    };
    const auto rotated = [&](size_t index, size_t channel, float* to) {
        const size_t angle = (past + index) * half;
        rotate(channels(index, channel), width, all.rotary, all.cos + angle, all.sin + angle, to);
    };
    keep_past(all.past_keys + kv_head * all.past_capacity * width, past, all.total, all.capacity, width, keys);
    keep_past(all.past_values + kv_head * all.past_capacity * width, past, all.total, all.capacity, width, values);
    for (size_t i = 0; i < all.length; ++i) {
        float key[LARGEST_HEAD];
        rotated(i, (all.heads + kv_head) * width, key);
        write_row(key, width, key_scales, keys + (past + i) * width);
        const float* value = channels(i, (all.heads + all.kv_heads + kv_head) * width);
        write_row(value, width, value_scales, values + (past + i) * width);
    }
    Rows rows{};
    rows.count = all.length * group;
    rows.query = [&](size_t row, float* query) {
        rotated(row / group, (kv_head * group + row % group) * width, query);
        multiply(query, width, all.scale * LOG2_E, key_scales, query);
    };
    rows.visible = [&](size_t row) { return past + row / group + 1; };
    rows.result = [&](size_t row) {
        return all.result + (row / group * all.heads + kv_head * group + row % group) * width;
    };
    const Head<T> head{keys, values, all.total, width, width, nullptr, value_scales};
    if (all.length == 1) attend_in_stream(head, rows);
    else attend_in_tiles(head, rows, factors);
}

// Scales for the channels of a head's first rows, the rows in these, and behind them what the past has there.
void fill_cache(
    const float* rows, const Causal<int8_t>& all, const CacheScaling& scaling, float* scales, const int8_t* past,
    int8_t* cache) {
    const size_t count = all.length, width = all.width;
    for_lanes(width, [&](size_t i, __mmask16 mask) __attribute__((always_inline)) {
        __m512 largest = _mm512_setzero_ps();
        for (size_t row = 0; row < count; ++row)
            largest = larger_magnitude(largest, load(rows + row * width + i, mask));
        const __m512 fitting = _mm512_mul_ps(largest, _mm512_set1_ps(scaling.factor));
        // The instruction gives its second operand if either is NaN.
        _mm512_mask_storeu_ps(scales + i, mask, _mm512_max_ps(_mm512_set1_ps(scaling.smallest), fitting));
    });
    for (size_t row = 0; row < count; ++row) write_row(rows + row * width, width, scales, cache + row * width);
    if (past != cache) std::copy(past + count * width, past + all.capacity * width, cache + count * width);
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
        const size_t key = batch * all.keys * all.stride + channel, query = batch * all.query_rows;
        const Head<float> head{all.k + key, all.v + key, all.keys, width, all.stride, bias, nullptr};
        Rows rows{};
        rows.count = all.queries;
        rows.query = [&](size_t row, float* to) {
            const float* from = all.q + (query + row) * all.stride + channel;
            if (row + AHEAD < all.queries) fetch(from + AHEAD * all.stride, width);
            multiply(from, width, all.scale * LOG2_E, nullptr, to);
        };
        rows.visible = [&](size_t) { return all.keys; };
        rows.result = [&](size_t row) { return all.result + (query + row) * row_width + channel; };
        attend_in_tiles(head, rows, factors);
    });
}

void fill_with_mean(const MultiHead& all, const Parallel& parallel) {
    const size_t row_width = all.heads * all.width;
    if (all.query_rows == all.queries) return;
    parallel(all.batch, [&](size_t batch) {
        const float* values = all.v + batch * all.keys * all.stride;
        float* const first_row = all.result + (batch * all.query_rows + all.queries) * row_width;
        for_lanes(row_width, [&](size_t i, __mmask16 mask) __attribute__((always_inline)) {
            __m512 sum = _mm512_setzero_ps();
            for (size_t key = 0; key < all.keys; ++key) sum = _mm512_add_ps(sum, load(values + key * all.stride + i, mask));
            sum = _mm512_div_ps(sum, _mm512_set1_ps(float(all.keys)));
            for (size_t row = 0; row < all.query_rows - all.queries; ++row)
                _mm512_mask_storeu_ps(first_row + row * row_width + i, mask, sum);
        });
    });
}

template <typename T>
void attend(const Causal<T>& attention, Factors factors, const Parallel& parallel) {
    parallel(attention.kv_heads, [&](size_t kv_head) {
        const size_t place = kv_head * attention.capacity * attention.width;
        attend_head(attention, kv_head, attention.keys + place, attention.values + place, factors);
    });
}

void attend_and_fill(
    const Causal<int8_t>& all, const CacheScaling& scaling, Factors factors, const Parallel& parallel) {
    Causal<float> floats{};
    floats.qkv = all.qkv;
    floats.cos = all.cos;
    floats.sin = all.sin;
    floats.result = all.result;
    floats.length = floats.total = floats.capacity = all.length;
    floats.heads = all.heads;
    floats.kv_heads = all.kv_heads;
    floats.width = all.width;
    floats.rotary = all.rotary;
    floats.scale = all.scale;
    parallel(all.kv_heads, [&](size_t kv_head) {
        static thread_local Scratch<float> memory;
        float* const keys = memory.of(2 * all.length * all.width);
        float* const values = keys + all.length * all.width;
        attend_head(floats, kv_head, keys, values, factors);
        const size_t place = kv_head * all.capacity * all.width, channel = kv_head * all.width;
        fill_cache(keys, all, scaling, scaling.keys + channel, all.past_keys + place, all.keys + place);
        fill_cache(values, all, scaling, scaling.values + channel, all.past_values + place, all.values + place);
    });
}

template void attend(const Causal<float>&, Factors, const Parallel&);
template void attend(const Causal<int8_t>&, Factors, const Parallel&);

}  // namespace fusion_edge
