#pragma once

#include <vector>

#include "onnxruntime_abi.h"

namespace fusion_edge {

// MultiHeadAttention, and GroupQueryAttention once for each type of cache.
std::vector<const onnxruntime::CustomOp*> attention_operators();

// CachedAttention, PackedAttention and PatchAttention: functions.
std::vector<const onnxruntime::CustomOp*> attention_functions();

// Whether factors are rounded to bfloat16, where the processor multiplies it; they are unless this says no.
void use_bfloat16(bool wanted);

}  // namespace fusion_edge
