#include "tier.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace fusion_edge {
namespace {

// Linux grants the state of tiles on request only (https://docs.kernel.org/arch/x86/xstate.html).
bool tiles_are_granted() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

Tier detect() {
    const bool has_vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
    if (!has_vnni) return Tier::NONE;
    const bool has_amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                         __builtin_cpu_supports("amx-bf16");
    return has_amx && tiles_are_granted() ? Tier::AMX : Tier::AVX512_VNNI;
}

std::atomic<Tier>& in_use() {
    static std::atomic<Tier> tier = fastest_tier();
    return tier;
}

}  // namespace

Tier fastest_tier() {
    static const Tier fastest = detect();
    return fastest;
}

Tier tier() { return in_use(); }

const char* name(Tier tier) {
    switch (tier) {
        case Tier::AMX: return "AMX";
        case Tier::AVX512_VNNI: return "AVX-512 VNNI";
        case Tier::NONE: break;
    }
    return nullptr;
}

bool use_tier(const char* chosen) {
    for (const Tier one : {Tier::AVX512_VNNI, Tier::AMX})
        if (std::strcmp(chosen, name(one)) == 0 && one <= fastest_tier()) {
            in_use() = one;
            return true;
        }
    return false;
}

}  // namespace fusion_edge
