// AVX2 without VNNI: x86-64 processors from 2013 on.

#ifdef __x86_64__

#define SIMD avx2
#include "headers.h"

#include "tiers.h"

#pragma GCC target("avx2,fma,f16c")

#include "../simd/avx2.h"
#include "../generic/functions.h"
#include "../micro_kernels/avx2.h"
#include "../generic/kernels.h"

namespace fusion_edge {

const Kernels& avx2_kernels() {
    static const SIMD::TierKernels<SIMD::TileGemm, SIMD::TileFlash> kernels("AVX2");
    return kernels;
}

}  // namespace fusion_edge

#endif
