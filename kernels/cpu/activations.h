// Element-wise activation functions of float32 arrays.

#pragma once

#include <cstddef>

#include "parallel.h"

namespace fusion_edge {

// result [count] = x / (1 + e^(-slope x)). With slope 1 it is SiLU.
void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel);

// result [count] = SiLU(gate) * up (https://arxiv.org/abs/2002.05202).
void swiglu(const float* gate, const float* up, size_t count, float* result, const Parallel& parallel);

// result [count] = GELU(x) in its tanh form (https://arxiv.org/abs/1606.08415, section 2):
// x (1 + tanh u) / 2 = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
void gelu(const float* x, size_t count, float* result, const Parallel& parallel);

}  // namespace fusion_edge
