// Activation functions of float32 values, one by one.

#pragma once

#include <cstddef>

#include "products.h"

namespace fusion_edge {

// result = x / (1 + e^(-slope * x)), for `count` values: the SiLU if the slope is 1.
void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel);

// result = gate / (1 + e^(-gate)) * up, for `count` values: https://arxiv.org/abs/2002.05202.
void swiglu(const float* gate, const float* up, size_t count, float* result, const Parallel& parallel);

// The GELU with a hyperbolic tangent, https://arxiv.org/abs/1606.08415 section 2: x (1 + tanh u) / 2 = x / (1 + e^(-2 u))
// with u = sqrt(2 / pi) (x + 0.044715 x^3).
void gelu(const float* x, size_t count, float* result, const Parallel& parallel);

}  // namespace fusion_edge
