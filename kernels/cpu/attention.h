// Attention of float32 queries, softmax(q k^T) v, without its matrix of scores ever being stored whole.
//
// Method: keys by blocks, with a running maximum and sum for each row (https://arxiv.org/abs/2205.14135).

#pragma once

#include <cstddef>
#include <cstdint>

#include "products.h"

namespace fusion_edge {

constexpr size_t LARGEST_HEAD = 256;  // channels

// What factors are rounded to before they are multiplied. Sums are always float32.
enum class Factors { FLOAT32, BFLOAT16 };

// Every query attends to every key of its batch.
struct MultiHead {
    const float *q, *k, *v;     // [batch, queries, heads * width], [batch, keys, heads * width] twice; rows `stride` apart
    const int32_t* key_mask;    // [batch, keys]: 0 where `masked` is added to a key's scores; or null
    float* result;              // [batch, queries, heads * width]
    size_t batch, queries, keys, heads, width, stride;
    size_t query_rows;          // of a batch, in the memory of q and of the result: `queries` or more
    float scale, masked;
};

void attend(const MultiHead& attention, Factors factors, const Parallel& parallel);

// Rows of the result behind the queries' become the mean of all values of their batch.
void fill_with_mean(const MultiHead& attention, const Parallel& parallel);

// Some positions of one sequence attend to those up to their own. T is what the cache holds: float or int8_t.
template <typename T>
struct Causal {
    const float* qkv;                  // [length, (heads + 2 * kv_heads) * width], before the rotation
    const float *cos, *sin;            // [positions, rotary / 2]; channels behind `rotary` are not rotated
    const T *past_keys, *past_values;  // [kv_heads, past_capacity, width], positions before these
    T *keys, *values;                  // [kv_heads, capacity, width]: those and these; may be the past's memory
    const float *key_scales, *value_scales;  // [kv_heads, width] of int8, or null
    float* result;                           // [length, heads * width]
    size_t length, total, past_capacity, capacity, heads, kv_heads, width, rotary;
    float scale;
};

template <typename T>
void attend(const Causal<T>& attention, Factors factors, const Parallel& parallel);

// How an int8 cache is scaled: a channel's scale is its largest value times a factor, but at least the smallest scale.
struct CacheScaling {
    float factor, smallest;
    float *keys, *values;  // [kv_heads, width]: where the scales are written
};

// A prefill, from position 0 on: attends to its own keys and values in float, then derives the scales of the cache from
// them and fills it. What stands behind them there stays that of the past.
void attend_and_fill(
    const Causal<int8_t>& attention, const CacheScaling& scaling, Factors factors, const Parallel& parallel);

}  // namespace fusion_edge
