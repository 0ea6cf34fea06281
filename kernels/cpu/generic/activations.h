// Activation functions of arrays.

#pragma once

#include "functions.h"

namespace fusion_edge::SIMD {

constexpr size_t VALUES_PER_TASK = 16 << 10;  // a thread costs more than it gains for fewer values

// result[i] = function(values[i]...), for one input array or more.
template <typename Function, typename... Values>
void apply(size_t count, float* result, const Parallel& parallel, Function function, const Values*... values) {
    parallel((count + VALUES_PER_TASK - 1) / VALUES_PER_TASK, [&](size_t group) {
        const size_t end = std::min(count, (group + 1) * VALUES_PER_TASK);
        for (size_t i = group * VALUES_PER_TASK; i < end; i += LANES)
            store(result + i, function(load(values + i, end - i)...), end - i);
    });
}

// Each lambda captures something: GCC inlines a lambda into the loop, but not the function pointer it would decay to.

void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel) {
    apply(count, result, parallel, [=](Floats x) __attribute__((always_inline)) { return swish(x, slope); }, x);
}

void swiglu(const float* gate, const float* up, size_t count, float* result, const Parallel& parallel) {
    const auto function = [slope = 1.0f](Floats gate, Floats up) __attribute__((always_inline)) {
        return mul(swish(gate, slope), up);
    };
    apply(count, result, parallel, function, gate, up);
}

void gelu(const float* x, size_t count, float* result, const Parallel& parallel) {
    apply(count, result, parallel, [=](Floats x) __attribute__((always_inline)) { return gelu(x); }, x);
}

}  // namespace fusion_edge::SIMD
