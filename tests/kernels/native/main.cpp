// Checks every kernel of every tier of this processor against plain C++. Arguments are the tiers that it must have, the
// fastest last; without any, it may have none. A line for each failure, and exit code 1 if there is one.

#include <cstdio>
#include <cstring>

#include "checks.h"

int main(int count, char** names) {
    using namespace fusion_edge;
    const char* const* tiers = fusion_edge::tiers();
    size_t failures = checks::check_tile_emulation(), found = 0;
    for (; tiers[found]; ++found) {
        use_tier(tiers[found]);
        checks::Checks checks(*kernels());
        check_activations(checks);
        check_linear_layers(checks);
        check_attention(checks);
        std::printf("%s: %zu checks, %zu failures\n", tiers[found], checks.count(), checks.failures());
        failures += checks.failures();
    }
    bool same = count == 1 || found + 1 == size_t(count);
    for (int i = 1; same && i < count; ++i) same = std::strcmp(tiers[i - 1], names[i]) == 0;
    if (!same) {
        std::printf("FAILED: this processor has other tiers; expected:");
        for (int i = 1; i < count; ++i) std::printf(" '%s'", names[i]);
        std::printf("\n");
    }
    return failures || !same;
}
