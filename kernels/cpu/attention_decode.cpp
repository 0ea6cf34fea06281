// Attention of a decode step, bound by memory bandwidth: keys and values are read once, in place.

#include <algorithm>
#include <utility>

#include "attention_kernels.h"
#include "simd.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

__m512 sum_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// Lane i of the result is the sum of the lanes of values[i].
__m512 sum_each(const __m512* values) {
    __m512 pairs[8], fours[4];
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(
            _mm512_unpacklo_ps(values[2 * i], values[2 * i + 1]), _mm512_unpackhi_ps(values[2 * i], values[2 * i + 1]));
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i)
        fours[i] = _mm512_castpd_ps(_mm512_castps_pd(_mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]))),
            _mm512_castpd_ps(
                _mm512_unpackhi_pd(_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]))))));
    return sum_halves(sum_halves(fours[0], fours[1]), sum_halves(fours[2], fours[3]));
}

constexpr size_t PREFETCH_DISTANCE = 4096;  // bytes
constexpr size_t CACHE_LINE = 64;           // bytes

// Prefetches ahead of a row. The hardware prefetcher is fast enough for int8 rows.
template <typename T>
[[gnu::always_inline]] inline void prefetch(const T* row, size_t width) {
    if constexpr (sizeof(T) == sizeof(float))
        for (size_t i = 0; i < width; i += CACHE_LINE / sizeof(T))
            _mm_prefetch(reinterpret_cast<const char*>(row + i) + PREFETCH_DISTANCE, _MM_HINT_T1);
}

// Dot products of one key with queries I, not summed over lanes.
template <typename T, size_t... I>
[[gnu::always_inline]] inline void dot_products(
    std::index_sequence<I...>, const T* key, size_t width, const float* queries, __m512* products) {
    prefetch(key, width);
    __m512 sums[] = {(void(I), _mm512_setzero_ps())...};
    const auto add = [&](size_t i, __m512 channels) __attribute__((always_inline)) {
        ((sums[I] = _mm512_fmadd_ps(channels, _mm512_load_ps(queries + I * MAX_HEAD_WIDTH + i), sums[I])), ...);
    };
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) add(i, load(key + i));
    if (i < width) add(i, load(key + i, lane_mask(width - i)));
    ((products[I] = sums[I]), ...);
}

// Scores [16 / ROWS keys, ROWS] of the keys from `key` on; I: 0 ... 16 / ROWS - 1.
template <size_t ROWS, typename T, size_t... I>
__m512 score(std::index_sequence<I...>, const KvHead<T>& head, size_t key, const float* queries) {
    __m512 products[LANES];
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
    (prefetch(values + K * stride, width), ...);
    const auto add_key = [&](__m512* sums, __m512 value, const float* key_weights) __attribute__((always_inline)) {
        ((sums[I] = _mm512_fmadd_ps(value, _mm512_set1_ps(key_weights[I]), sums[I])), ...);
    };
    const auto add = [&](size_t i, auto... channels) __attribute__((always_inline)) {
        __m512 sums[] = {_mm512_load_ps(results + I * MAX_HEAD_WIDTH + i)...};
        (add_key(sums, channels, weights + K * ROWS), ...);
        (_mm512_store_ps(results + I * MAX_HEAD_WIDTH + i, sums[I]), ...);
    };
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) add(i, load(values + K * stride + i)...);
    if (i < width) add(i, load(values + K * stride + i, lane_mask(width - i))...);
}

// Attention of ROWS query rows from `row` on.
template <size_t ROWS, typename T>
void attend(const KvHead<T>& head, const QueryRows& rows, size_t row) {
    static thread_local Scratch<float> memory;
    constexpr size_t KEYS = LANES / ROWS;
    alignas(64) float queries[ROWS * MAX_HEAD_WIDTH] = {}, results[ROWS * MAX_HEAD_WIDTH] = {}, lanes[LANES];
    for (size_t i = 0; i < ROWS; ++i) rows.query(row + i, queries + i * MAX_HEAD_WIDTH);
    const size_t scores = head.count * ROWS;
    float* weights = memory.of(round_up(scores, LANES));
    __m512 largest = _mm512_set1_ps(-3e38f), sum = _mm512_setzero_ps();
    for (size_t key = 0; key < head.count; key += KEYS) {
        const __m512 block = score<ROWS>(std::make_index_sequence<KEYS>(), head, key, queries);
        _mm512_store_ps(weights + key * ROWS, block);
        largest = _mm512_max_ps(largest, block);
    }
    _mm512_store_ps(lanes, largest);
    combine<ROWS>(lanes, [](float a, float b) { return std::max(a, b); });
    for (size_t i = ROWS; i < LANES; ++i) lanes[i] = lanes[i % ROWS];
    largest = _mm512_load_ps(lanes);
    for (size_t i = 0; i < scores; i += LANES) {
        const __m512 weight = exp2(_mm512_sub_ps(_mm512_load_ps(weights + i), largest));
        _mm512_store_ps(weights + i, weight);
        sum = _mm512_mask_add_ps(sum, lane_mask(scores - i), sum, weight);
    }
    _mm512_store_ps(lanes, sum);
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

}  // namespace

template <typename T>
void decode_attention(const KvHead<T>& head, const QueryRows& rows) {
    size_t row = 0;
    for (; row + 4 <= rows.count; row += 4) attend<4>(head, rows, row);
    for (; row + 2 <= rows.count; row += 2) attend<2>(head, rows, row);
    for (; row < rows.count; ++row) attend<1>(head, rows, row);
}

template void decode_attention(const KvHead<float>&, const QueryRows&);
template void decode_attention(const KvHead<int8_t>&, const QueryRows&);

}  // namespace fusion_edge
