// Operands of attention of float32 queries: softmax(scale q k^T) v.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fusion_edge {

constexpr size_t MAX_HEAD_WIDTH = 256;  // channels of a head

// Precision of the factors of matmuls. Sums are float32.
enum class Precision { FLOAT32, BFLOAT16 };

// Multi-head attention: every query sees every key of its batch.
struct MultiHeadParams {
    const float *q, *k, *v;   // [batch, query_rows or keys, heads * width], with a row stride of `stride`
    const int32_t* key_mask;  // [batch, keys]; where it is 0, `masked` is added to the scores. Null: no mask
    float* result;            // [batch, query_rows, heads * width]
    size_t batch, queries, keys, heads, width, stride;
    size_t query_rows;  // rows per batch of q and of the result; the first `queries` attend
    float scale, masked;
};

// Causal attention with rotary embedding and a KV cache of element type T (float or int8_t). The `length` new tokens
// follow the `total - length` cached ones.
template <typename T>
struct CausalParams {
    const float* qkv;                  // [length, (heads + 2 * kv_heads) * width], before the rotation
    const float *cos, *sin;            // [positions, rotary / 2]; channels from `rotary` on are not rotated
    const T *past_keys, *past_values;  // [kv_heads, past_capacity, width]: cached tokens
    T *keys, *values;                  // [kv_heads, capacity, width]: cached and new tokens; may alias the past
    const float *key_scales, *value_scales;  // [kv_heads, width], scales of an int8 cache; else null
    float* result;                           // [length, heads * width]
    size_t length, total, past_capacity, capacity, heads, kv_heads, width, rotary;
    float scale;
};

// Quantization of an int8 cache: scale of a channel = max(largest magnitude * factor, smallest).
struct CacheQuantization {
    float factor, smallest;
    float *keys, *values;  // [kv_heads, width]: output of the scales
};

}  // namespace fusion_edge
