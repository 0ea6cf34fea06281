#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tiers/tiers.h"

namespace fusion_edge {
namespace {

#ifdef __x86_64__

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx_vnni() {
    return has_avx2() && __builtin_cpu_supports("avxvnni");
}

bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

// Linux grants the state of tiles on request only, once a process (https://docs.kernel.org/arch/x86/xstate.html).
[[maybe_unused]] bool tiles_are_granted() {
#ifdef __linux__
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

bool has_amx() {
    const bool has_rest = has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
#ifdef EMULATE_AMX
    return has_rest;
#else
    return has_rest && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           __builtin_cpu_supports("amx-bf16") && tiles_are_granted();
#endif
}

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
    if (has_avx2()) found.push_back(&avx2_kernels());
    if (has_avx_vnni()) found.push_back(&avx_vnni_kernels());
    if (has_avx512_vnni()) found.push_back(&avx512_vnni_kernels());
    if (has_amx()) found.push_back(&amx_kernels());
    return found;
}

bool is_intel() { return __builtin_cpu_is("intel"); }

#elif defined(__aarch64__) && defined(__linux__)

std::vector<const Kernels*> detect() {
    // https://docs.kernel.org/arch/arm64/elf_hwcaps.html
    constexpr unsigned long DOT_PRODUCT = 1 << 20, INT8_MATRICES = 1 << 13;
    const bool has_dot_product = getauxval(AT_HWCAP) & DOT_PRODUCT;
    std::vector<const Kernels*> found;
    if (has_dot_product) found.push_back(&neon_dot_kernels());
    if (has_dot_product && getauxval(AT_HWCAP2) & INT8_MATRICES) found.push_back(&neon_i8mm_kernels());
    return found;
}

bool is_intel() { return false; }

#else

std::vector<const Kernels*> detect() { return {}; }

bool is_intel() { return false; }

#endif

// Kernels of this processor's tiers, the fastest last.
const std::vector<const Kernels*>& all() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

std::atomic<const Kernels*>& in_use() {
    static std::atomic<const Kernels*> kernels = all().empty() ? nullptr : all().back();
    return kernels;
}

std::atomic<size_t>& threads() {
    static std::atomic<size_t> count = std::max(std::thread::hardware_concurrency(), 1u);
    return count;
}

std::atomic<bool>& streams() {
    static std::atomic<bool> enabled = is_intel();
    return enabled;
}

}  // namespace

const Kernels* kernels() { return in_use(); }

const char* const* tiers() {
    static const std::vector<const char*> names = [] {
        std::vector<const char*> names;
        for (const Kernels* one : all()) names.push_back(one->tier());
        names.push_back(nullptr);
        return names;
    }();
    return names.data();
}

bool use_tier(const char* name) {
    for (const Kernels* one : all())
        if (std::strcmp(name, one->tier()) == 0) {
            in_use() = one;
            return true;
        }
    return false;
}

void use_threads(size_t count) { threads() = count; }

size_t balanced_tasks() {
    constexpr size_t TASKS_PER_THREAD = 4;
    return TASKS_PER_THREAD * threads();
}

bool reads_streams() { return streams(); }

bool use_streams(bool enabled) { return streams().exchange(enabled); }

}  // namespace fusion_edge
