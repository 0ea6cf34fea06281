#include "activations.h"

#include <algorithm>

#include "lanes.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")

namespace fusion_edge {
namespace {

constexpr float TWO_ROOT_TWO_OVER_PI = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr size_t TOGETHER = 16 << 10;                // values: less would not be worth a thread's while

constexpr float SMALLEST_EXPONENT = -160;  // two to its power is 0; infinities never come to a difference

// x / (1 + 2^-z): from the exponential of a negative number, which cannot overflow.
[[gnu::always_inline]] inline __m512 gated(__m512 x, __m512 z) {
    const __m512 one = _mm512_set1_ps(1), size = _mm512_min_ps(z, _mm512_sub_ps(_mm512_setzero_ps(), z));
    const __m512 power = exp2(_mm512_max_ps(size, _mm512_set1_ps(SMALLEST_EXPONENT)));
    const __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mul_ps(x, _mm512_mask_mov_ps(one, negative, power)), _mm512_add_ps(one, power));
}

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

void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel) {
    const __m512 factor = _mm512_set1_ps(slope * LOG2_E);
    const auto function = [=](__m512 value) __attribute__((always_inline)) {
        return gated(value, _mm512_mul_ps(value, factor));
    };
    apply(count, result, parallel, function, x);
}

void swiglu(const float* gate, const float* up, size_t count, float* result, const Parallel& parallel) {
    const __m512 factor = _mm512_set1_ps(LOG2_E);
    const auto function = [=](__m512 gate, __m512 up) __attribute__((always_inline)) {
        return _mm512_mul_ps(gated(gate, _mm512_mul_ps(gate, factor)), up);
    };
    apply(count, result, parallel, function, gate, up);
}

void gelu(const float* x, size_t count, float* result, const Parallel& parallel) {
    const __m512 linear = _mm512_set1_ps(TWO_ROOT_TWO_OVER_PI * LOG2_E);
    const __m512 cubic = _mm512_set1_ps(TWO_ROOT_TWO_OVER_PI * LOG2_E * 0.044715f);
    const auto function = [=](__m512 value) __attribute__((always_inline)) {
        return gated(value, _mm512_mul_ps(value, _mm512_fmadd_ps(_mm512_mul_ps(value, value), cubic, linear)));
    };
    apply(count, result, parallel, function, x);
}

}  // namespace fusion_edge
