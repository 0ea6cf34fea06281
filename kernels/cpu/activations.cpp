#include "activations.h"

#include <algorithm>

#include "activation_lanes.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr size_t TOGETHER = 16 << 10;                // values: less would not be worth a thread's while

// Of the values of one array or of several.
template <typename Function, typename... Values>
void apply(size_t count, float* result, const Parallel& parallel, Function function, const Values*... values) {
    parallel((count + TOGETHER - 1) / TOGETHER, [&](size_t group) {
        const size_t end = std::min(count, (group + 1) * TOGETHER);
        for (size_t i = group * TOGETHER; i < end; i += LANES) {
            const __mmask16 mask = first(end - i);
            _mm512_mask_storeu_ps(result + i, mask, function(_mm512_maskz_loadu_ps(mask, values + i)...));
        }
    });
}

}  // namespace

// A closure, even of nothing: as functions without one they would not become part of the loop.

void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel) {
    apply(count, result, parallel, [=](__m512 x) __attribute__((always_inline)) { return swish(x, slope); }, x);
}

void swiglu(const float* gate, const float* up, size_t count, float* result, const Parallel& parallel) {
    const auto function = [slope = 1.0f](__m512 gate, __m512 up) __attribute__((always_inline)) {
        return _mm512_mul_ps(swish(gate, slope), up);
    };
    apply(count, result, parallel, function, gate, up);
}

void gelu(const float* x, size_t count, float* result, const Parallel& parallel) {
    apply(count, result, parallel, [=](__m512 x) __attribute__((always_inline)) { return gelu(x); }, x);
}

}  // namespace fusion_edge
