// NEON with dot products: ARM processors from 2018 on, Raspberry Pi 5, Jetson Orin.

#ifdef __aarch64__

#include <arm_neon.h>

#define SIMD neon_dot
#include "headers.h"

#include "tiers.h"

#pragma GCC target("arch=armv8.2-a+dotprod")

#include "../simd/neon.h"
#include "../generic/functions.h"
#include "../micro_kernels/neon_dot.h"
#include "../generic/kernels.h"

namespace fusion_edge {

const Kernels& neon_dot_kernels() {
    static const SIMD::TierKernels<SIMD::TileGemm, SIMD::TileFlash> kernels("NEON dot product");
    return kernels;
}

}  // namespace fusion_edge

#endif
