// NEON with products of int8 matrices: ARM processors from 2021 on, Jetson Thor.

#ifdef __aarch64__

#include <arm_neon.h>

#define SIMD neon_i8mm
#include "headers.h"

#include "tiers.h"

#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")

#include "../simd/neon.h"
#include "../generic/functions.h"
#include "../micro_kernels/neon_i8mm.h"
#include "../generic/kernels.h"

namespace fusion_edge {

const Kernels& neon_i8mm_kernels() {
    static const SIMD::TierKernels<SIMD::TileGemm, SIMD::TileFlash> kernels("NEON i8mm");
    return kernels;
}

}  // namespace fusion_edge

#endif
