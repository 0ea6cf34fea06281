// Memory that kernels reuse.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include <unistd.h>

namespace fusion_edge::SIMD {

// Size of a core's L2 cache in bytes.
inline size_t l2_cache() {
    constexpr long USUAL = 512 << 10;
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1: not known
    return size > 0 ? size : USUAL;
#else
    return USUAL;
#endif
}

inline constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Uninitialized memory, aligned to 64 bytes, that a thread reuses in its next call. It only grows.
template <typename T>
class Scratch {
  public:
    T* of(size_t count) {
        const size_t bytes = round_up(count * sizeof(T), 64);
        if (bytes > bytes_) {
            memory_.reset();  // before the allocation, to lower the peak
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            bytes_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> memory_;
    size_t bytes_ = 0;
};

}  // namespace fusion_edge::SIMD
