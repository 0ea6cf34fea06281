// Tiers: instruction sets that kernels are written for.

#pragma once

namespace fusion_edge {

// In the order of speed. A processor with one has all before it.
enum class Tier { NONE, AVX512_VNNI, AMX };

// Fastest tier of this processor. For AMX, asks the kernel of Linux for the tiles' state, once a process.
Tier fastest_tier();

// Tier in use: the fastest one, unless use_tier chose another.
Tier tier();

// Name of a tier; null for NONE.
const char* name(Tier tier);

// Uses the tier of a name, and returns whether this processor has it.
bool use_tier(const char* name);

}  // namespace fusion_edge
