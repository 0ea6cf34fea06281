// Instructions of AMX's tiles. emulation.h has functions of the same names that need no such processor.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fusion_edge::SIMD {

// Sizes of the tiles, as ldtilecfg reads them.
struct alignas(64) TileSizes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Inline assembly: the intrinsics of GCC 12 are macros that take literal numbers of tiles.
struct TileInstructions {
    [[gnu::always_inline]] static void configure(const TileSizes& sizes) {
        asm volatile("ldtilecfg %0" : : "m"(sizes));
    }
    [[gnu::always_inline]] static void release() { asm volatile("tilerelease"); }

    template <int TILE>
    [[gnu::always_inline]] static void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
    template <int TILE>
    [[gnu::always_inline]] static void load(const void* from, size_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
    }
    template <int TILE>
    [[gnu::always_inline]] static void store(void* to, size_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
    }

    // sums += rows * columns: of int8 or, as the name says for each, uint8; or of bfloat16.
    template <int SUMS, int ROWS, int COLUMNS>
    [[gnu::always_inline]] static void multiply_signed_signed() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS), "i"(COLUMNS));
    }
    template <int SUMS, int ROWS, int COLUMNS>
    [[gnu::always_inline]] static void multiply_signed_unsigned() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS), "i"(COLUMNS));
    }
    template <int SUMS, int ROWS, int COLUMNS>
    [[gnu::always_inline]] static void multiply_bfloat16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS), "i"(COLUMNS));
    }
};

}  // namespace fusion_edge::SIMD
