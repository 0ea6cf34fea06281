// Kernels of each tier.

#pragma once

#include "../kernels.h"

namespace fusion_edge {

#ifdef __x86_64__
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& amx_kernels();
#elif defined(__aarch64__)
const Kernels& neon_dot_kernels();
const Kernels& neon_i8mm_kernels();
#endif

}  // namespace fusion_edge
