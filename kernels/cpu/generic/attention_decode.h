// Attention of a decode step, bound by memory bandwidth: keys and values are read once, in place.

#pragma once

#include <algorithm>
#include <utility>

#include "attention_kernels.h"

namespace fusion_edge::SIMD {

constexpr size_t BYTES_AHEAD = 4096;  // of a prefetch
constexpr size_t CACHE_LINE = 64;     // bytes

// Prefetches ahead of a row. The hardware prefetcher is fast enough for int8 rows.
template <typename T>
[[gnu::always_inline]] inline void prefetch_ahead(const T* row, size_t width) {
    if constexpr (sizeof(T) == sizeof(float))
        for (size_t i = 0; i < width; i += CACHE_LINE / sizeof(T))
            __builtin_prefetch(reinterpret_cast<const char*>(row + i) + BYTES_AHEAD, 0, 2);
}

// Dot products of one key with queries I, not summed over lanes.
template <typename T, size_t... I>
[[gnu::always_inline]] inline void dot_products(
    std::index_sequence<I...>, const T* key, size_t width, const float* queries, Floats* products) {
    prefetch_ahead(key, width);
    Floats sums[] = {(void(I), broadcast(0))...};
    const auto add_channels = [&](size_t i, Floats channels) __attribute__((always_inline)) {
        ((sums[I] = fma(channels, load(queries + I * MAX_HEAD_WIDTH + i), sums[I])), ...);
    };
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) add_channels(i, load(key + i));
    if (i < width) add_channels(i, load(key + i, width - i));
    ((products[I] = sums[I]), ...);
}

// Scores [16 / ROWS keys, ROWS] of the keys from `key` on; I: 0 ... 16 / ROWS - 1.
template <size_t ROWS, typename T, size_t... I>
Floats score(std::index_sequence<I...>, const KvHead<T>& head, size_t key, const float* queries) {
    Floats products[LANES];
    const size_t last = head.count - 1;  // read again in place of keys after it
    (dot_products(
         std::make_index_sequence<ROWS>(), head.keys + std::min(key + I, last) * head.stride, head.width, queries,
         products + I * ROWS),
     ...);
    return sum_each(products);
}

// Reduces the lanes of each row, which are ROWS apart, into its first lane.
template <size_t ROWS, typename Combine>
void combine(float* lanes, Combine combine) {
    for (size_t distance = LANES / 2; distance >= ROWS; distance /= 2)
        for (size_t i = 0; i < distance; ++i) lanes[i] = combine(lanes[i], lanes[i + distance]);
}

constexpr size_t KEYS_PER_PASS = 4;

// results [rows, MAX_HEAD_WIDTH] += weights [keys, rows]^T values [keys, width], for keys K and rows I.
template <typename T, size_t... K, size_t... I>
void add_values(
    std::index_sequence<K...>, std::index_sequence<I...>, const T* values, size_t stride, size_t width,
    const float* weights, float* results) {
    constexpr size_t ROWS = sizeof...(I);
    (prefetch_ahead(values + K * stride, width), ...);
    const auto add_key = [&](Floats* sums, Floats value, const float* key_weights) __attribute__((always_inline)) {
        ((sums[I] = fma(value, broadcast(key_weights[I]), sums[I])), ...);
    };
    const auto add_channels = [&](size_t i, auto... channels) __attribute__((always_inline)) {
        Floats sums[] = {load(results + I * MAX_HEAD_WIDTH + i)...};
        (add_key(sums, channels, weights + K * ROWS), ...);
        (store(results + I * MAX_HEAD_WIDTH + i, sums[I]), ...);
    };
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) add_channels(i, load(values + K * stride + i)...);
    if (i < width) add_channels(i, load(values + K * stride + i, width - i)...);
}

// Attention of ROWS query rows from `row` on.
template <size_t ROWS, typename T>
void decode_rows(const KvHead<T>& head, const QueryRows& rows, size_t row) {
    static thread_local Scratch<float> memory;
    constexpr size_t KEYS = LANES / ROWS;
    alignas(64) float queries[ROWS * MAX_HEAD_WIDTH] = {}, results[ROWS * MAX_HEAD_WIDTH] = {}, lanes[LANES];
    for (size_t i = 0; i < ROWS; ++i) rows.query(row + i, queries + i * MAX_HEAD_WIDTH);
    const size_t scores = head.count * ROWS;
    float* weights = memory.of(round_up(scores, LANES));
    Floats largest = broadcast(MIN_SCORE), sum = broadcast(0);
    for (size_t key = 0; key < head.count; key += KEYS) {
        const Floats block = score<ROWS>(std::make_index_sequence<KEYS>(), head, key, queries);
        store(weights + key * ROWS, block);
        largest = max(largest, block);
    }
    store(lanes, largest);
    combine<ROWS>(lanes, [](float a, float b) { return std::max(a, b); });
    for (size_t i = ROWS; i < LANES; ++i) lanes[i] = lanes[i % ROWS];
    largest = load(lanes);
    for (size_t i = 0; i < scores; i += LANES) {
        const Floats weight = exp2(sub(load(weights + i), largest));
        store(weights + i, weight);
        sum = add(sum, keep_first(weight, scores - i));
    }
    store(lanes, sum);
    combine<ROWS>(lanes, [](float a, float b) { return a + b; });
    const auto add = [&](auto keys, size_t key) {
        add_values(
            keys, std::make_index_sequence<ROWS>(), head.values + key * head.stride, head.stride, head.width,
            weights + key * ROWS, results);
    };
    size_t key = 0;
    for (; key + KEYS_PER_PASS <= head.count; key += KEYS_PER_PASS) add(std::make_index_sequence<KEYS_PER_PASS>(), key);
    for (; key < head.count; ++key) add(std::make_index_sequence<1>(), key);
    for (size_t i = 0; i < ROWS; ++i) {
        float* to = rows.result(row + i);
        for (size_t j = 0; j < head.width; ++j)
            to[j] = results[i * MAX_HEAD_WIDTH + j] / lanes[i] * (head.value_scales ? head.value_scales[j] : 1);
    }
}

template <typename T>
void decode_attention(const KvHead<T>& head, const QueryRows& rows) {
    size_t row = 0;
    for (; row + 4 <= rows.count; row += 4) decode_rows<4>(head, rows, row);
    for (; row + 2 <= rows.count; row += 2) decode_rows<2>(head, rows, row);
    for (; row < rows.count; ++row) decode_rows<1>(head, rows, row);
}

}  // namespace fusion_edge::SIMD
