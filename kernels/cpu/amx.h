// AMX: eight tiles of up to 16 rows by 64 bytes. A product of tiles adds dot products of four bytes to 16 x 16 sums.

#pragma once

#include "simd.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8")

namespace fusion_edge {

constexpr size_t AMX_ROWS = 16, AMX_BYTES = 64;  // of a tile
constexpr size_t AMX_TILE = AMX_ROWS * AMX_BYTES;

// Layout of ldtilecfg's operand.
struct alignas(64) AmxConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// The tiles of this thread: 0 to 3 for sums, 4 and 5 for rows of `depth` bytes (left factor), 6 and 7 for depth / 4 rows
// of 16 words (right factor). Their state is released at the end: it slows context switches.
class AmxTiles {
  public:
    explicit AmxTiles(size_t depth) {
        const uint16_t bytes = uint16_t(depth);
        const uint8_t rows = uint8_t(depth / 4);
        const AmxConfig config = {
            1, 0, {}, {64, 64, 64, 64, bytes, bytes, 64, 64}, {16, 16, 16, 16, 16, 16, rows, rows}};
        _tile_loadconfig(&config);
    }
    ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    // Inline assembly: the intrinsics of GCC 12 are macros that take literal numbers of tiles.
    template <int TILE>
    [[gnu::always_inline]] void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
    template <int TILE>
    [[gnu::always_inline]] void load(const void* from) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(AMX_BYTES), "i"(TILE) : "memory");
    }
    template <int TILE>
    [[gnu::always_inline]] void store(void* to, size_t stride) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
    }
    // Adds products of int8 on the left with int8, or uint8 if UNSIGNED, on the right.
    template <int SUMS, int LEFT, int RIGHT, bool UNSIGNED>
    [[gnu::always_inline]] void multiply_add() {
        if constexpr (UNSIGNED)
            asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
        else
            asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
    }
};

}  // namespace fusion_edge

#pragma GCC pop_options
