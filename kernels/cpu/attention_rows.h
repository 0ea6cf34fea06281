// Rows of queries that attend to the same keys: those of one head, or of the heads that share its keys and values.

#pragma once

#include <cstddef>
#include <functional>

#include "attention.h"

namespace fusion_edge {

// Keys and values of one head. T is float or int8_t.
template <typename T>
struct Head {
    const T *keys, *values;  // [count, width], rows `stride` apart
    size_t count, width, stride;
    const float* bias;          // [count] added to the scores, in exponents of 2; or null
    const float* value_scales;  // [width] that results are multiplied by, or null
};

struct Rows {
    size_t count;
    std::function<void(size_t row, float* query)> query;  // writes a query so scaled that scores are exponents of 2
    std::function<size_t(size_t row)> visible;            // how many keys, from the first on, a row attends to: >= 1
    std::function<float*(size_t row)> result;             // [width]
};

// Many rows: keys and values are brought into the order of the products first.
template <typename T>
void attend_in_tiles(const Head<T>& head, const Rows& rows, Factors factors);

// Few rows that attend to every key, as in a step: keys and values are read once, as they lie. `bias` must be null.
template <typename T>
void attend_in_stream(const Head<T>& head, const Rows& rows);

}  // namespace fusion_edge
