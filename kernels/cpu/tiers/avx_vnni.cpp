// AVX-VNNI: Intel client processors from 2021 on, AMD from Zen 5 on.

#ifdef __x86_64__

#define SIMD avx_vnni
#define AVX_VNNI  // GCC 12 does not define __AVXVNNI__ after the pragma
#include "headers.h"

#include "tiers.h"

#pragma GCC target("avx2,fma,f16c,avxvnni")

#include "../simd/avx2.h"
#include "../generic/functions.h"
#include "../micro_kernels/avx2.h"
#include "../generic/kernels.h"

namespace fusion_edge {

const Kernels& avx_vnni_kernels() {
    static const SIMD::TierKernels<SIMD::TileGemm, SIMD::TileFlash> kernels("AVX-VNNI");
    return kernels;
}

}  // namespace fusion_edge

#endif
