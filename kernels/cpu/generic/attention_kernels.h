// Operands of attention kernels: the query rows and the keys and values of one KV head.

#pragma once

#include <cstddef>
#include <functional>

#include "../attention.h"

namespace fusion_edge::SIMD {

constexpr float MIN_SCORE = -3e38f;  // below every score; finite, as differences of scores must be

// Keys and values of one head. T is float or int8_t.
template <typename T>
struct KvHead {
    const T *keys, *values;  // [count, width], with a row stride of `stride`
    size_t count, width, stride;
    const float* bias;          // [count], added to the scores (in units of log2); null: none
    const float* value_scales;  // [width], scales of int8 values; null: none
};

// Query rows that share keys and values: those of one head, or of the query heads of a KV head (GQA).
struct QueryRows {
    size_t count;
    std::function<void(size_t row, float* query)> query;  // writes query * scale * log2(e): softmax is 2^score / sum
    std::function<size_t(size_t row)> visible;  // number of keys, from the first on, that the row sees: >= 1, ascending
    std::function<float*(size_t row)> result;   // [width]
};

// Prefill and vision: blockwise attention with an online softmax (https://arxiv.org/abs/2205.14135), in tiles of rows.
// Keys and values are repacked first.
template <typename T>
struct FlashKernel {
    size_t (*packed_bytes)(size_t keys, size_t width);
    void (*pack)(const KvHead<T>&, void* packed);  // memory aligned to 64 bytes
    // Attends rows from `first` to `end`. Reads the head's packed keys and values, not its own.
    void (*attend)(const KvHead<T>&, const void* packed, const QueryRows&, size_t first, size_t end);
};

}  // namespace fusion_edge::SIMD
