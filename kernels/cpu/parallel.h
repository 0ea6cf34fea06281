// Work that several threads share.

#pragma once

#include <cstddef>
#include <functional>

namespace fusion_edge {

// Calls `body` with each index below `count`, on several threads.
using Parallel = std::function<void(size_t count, const std::function<void(size_t)>& body)>;

}  // namespace fusion_edge
