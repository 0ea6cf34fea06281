#pragma once

#include <vector>

#include "onnxruntime_abi.h"

namespace fusion_edge {

// MultiHeadAttention, and GroupQueryAttention once for each type of cache.
std::vector<const onnxruntime::CustomOp*> attention_operators();

}  // namespace fusion_edge
