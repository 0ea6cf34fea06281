// AMX: tiles for more than a few rows; AVX-512 VNNI for the rest.

#ifdef __x86_64__

#define SIMD amx
#include "headers.h"

#include "tiers.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c,amx-tile,amx-int8,amx-bf16")

#include "../simd/avx512.h"
#include "../generic/functions.h"
#include "../micro_kernels/avx512_vnni.h"
#include "../generic/kernels.h"
#include "../amx/attention.h"
#include "../amx/gemm.h"

namespace fusion_edge {

const Kernels& amx_kernels() {
    static const SIMD::TierKernels<SIMD::AmxGemm, SIMD::AmxFlash> kernels("AMX");
    return kernels;
}

}  // namespace fusion_edge

#endif
