// Work that several threads share.

#pragma once

#include <cstddef>
#include <functional>

namespace fusion_edge {

// Calls `body` with each index below `count`, on several threads.
using Parallel = std::function<void(size_t count, const std::function<void(size_t)>& body)>;

// Number of tasks that keeps all threads busy to the end, although some are slower.
size_t balanced_tasks();

}  // namespace fusion_edge
