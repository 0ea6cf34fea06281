// The operators of this library, by topic. kernels/operators.py holds the same signatures.

#pragma once

#include <vector>

#include "onnxruntime_abi.h"

namespace fusion_edge {

using Operators = std::vector<const onnxruntime::CustomOp*>;

// Of the domain com.microsoft, in place of ONNX Runtime's own.
Operators contributed_attention_operators();   // MultiHeadAttention; GroupQueryAttention for each type of cache
Operators contributed_linear_operators();      // MatMulNBits with float32 scales
Operators contributed_activation_operators();  // QuickGelu, FastGelu

// Of the domain fusion_edge, in place of functions.
Operators attention_operators();   // CachedAttention, PackedAttention, PatchAttention
Operators linear_operators();      // MatMulNBits with float16 scales, IntegerProduct, both with GELU; IntegerMlp
Operators activation_operators();  // SwiGlu

// Enables bfloat16 in attention where the processor supports it. It is enabled by default.
void use_bfloat16(bool enabled);

}  // namespace fusion_edge
