// AVX-512 VNNI.

#ifdef __x86_64__

#define SIMD avx512_vnni
#include "headers.h"

#include "tiers.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")

#include "../simd/avx512.h"
#include "../generic/functions.h"
#include "../micro_kernels/avx512_vnni.h"
#include "../generic/kernels.h"

namespace fusion_edge {

const Kernels& avx512_vnni_kernels() {
    static const SIMD::TierKernels<SIMD::TileGemm, SIMD::TileFlash> kernels("AVX-512 VNNI");
    return kernels;
}

}  // namespace fusion_edge

#endif
