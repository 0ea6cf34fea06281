// Work that several threads share.

#pragma once

#include <cstddef>
#include <functional>
#include <thread>

namespace fusion_edge {

// Calls `body` with each index below `count`, on several threads.
using Parallel = std::function<void(size_t count, const std::function<void(size_t)>& body)>;

// Tasks that keep all processors busy to the end, although some are slower.
inline size_t balanced_tasks() {
    constexpr size_t TASKS = 4;  // a processor
    static const size_t tasks = TASKS * (std::thread::hardware_concurrency() ? std::thread::hardware_concurrency() : 1);
    return tasks;
}

}  // namespace fusion_edge
