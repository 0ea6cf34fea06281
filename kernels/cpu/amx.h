// AMX: eight tiles of 16 rows by 64 bytes. TDPBUSD adds products of uint8 rows and int8 columns to 16 x 16 sums,
// TDPBF16PS those of bfloat16.

#pragma once

#include "simd.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8,amx-bf16")

namespace fusion_edge {

constexpr size_t AMX_ROWS = 16, AMX_BYTES = 64;  // of a tile
constexpr size_t AMX_TILE = AMX_ROWS * AMX_BYTES;
constexpr size_t AMX_STEP_PREFETCH = 4;  // lines of 64 bytes

// Layout of ldtilecfg's operand.
struct AmxConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

alignas(64) inline constexpr AmxConfig ALL_TILES = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The tiles of this thread, all of full size. Their state is released at the end: it slows context switches.
class AmxTiles {
  public:
    AmxTiles() { _tile_loadconfig(&ALL_TILES); }
    ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    // Inline assembly: the intrinsics of GCC 12 are macros that take literal numbers of tiles.
    template <int TILE>
    [[gnu::always_inline]] void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
    template <int TILE>
    [[gnu::always_inline]] void load(const void* from, size_t stride = AMX_BYTES) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
    }
    template <int TILE>
    [[gnu::always_inline]] void store(void* to, size_t stride) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
    }
    template <int SUMS, int ROWS, int COLUMNS>
    [[gnu::always_inline]] void multiply_add() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS), "i"(COLUMNS));
    }
    template <int SUMS, int ROWS, int COLUMNS>
    [[gnu::always_inline]] void multiply_add_bfloat16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS), "i"(COLUMNS));
    }
};

// sums [16 * ROW_TILES, 32] = rows * columns, plus the sums before with ADDS. `rows` are ROW_TILES sequences of `steps`
// tiles, `row_stride` bytes apart; `columns` are tiles [steps, 2]. Prefetches `next` to the L2 cache, some lines in
// each step.
template <int ROW_TILES, bool ADDS>
void multiply_tiles(
    AmxTiles& tiles, const uint8_t* rows, size_t row_stride, const uint8_t* columns, size_t steps, int32_t* sums,
    const uint8_t* next) {
    constexpr size_t STRIDE = 2 * AMX_BYTES;
    uint8_t* const to = reinterpret_cast<uint8_t*>(sums);
    if constexpr (ADDS) {
        tiles.load<0>(to, STRIDE);
        tiles.load<1>(to + AMX_BYTES, STRIDE);
        if constexpr (ROW_TILES == 2) {
            tiles.load<2>(to + AMX_ROWS * STRIDE, STRIDE);
            tiles.load<3>(to + AMX_ROWS * STRIDE + AMX_BYTES, STRIDE);
        }
    } else {
        tiles.zero<0>();
        tiles.zero<1>();
        if constexpr (ROW_TILES == 2) {
            tiles.zero<2>();
            tiles.zero<3>();
        }
    }
    const uint8_t* second = rows + row_stride;
    for (size_t step = 0; step < steps; ++step, rows += AMX_TILE, second += AMX_TILE, columns += 2 * AMX_TILE) {
        for (size_t i = 0; i < AMX_STEP_PREFETCH; ++i, next += AMX_BYTES) _mm_prefetch(next, _MM_HINT_T1);
        tiles.load<6>(columns);
        tiles.load<4>(rows);
        tiles.multiply_add<0, 4, 6>();
        tiles.load<7>(columns + AMX_TILE);
        tiles.multiply_add<1, 4, 7>();
        if constexpr (ROW_TILES == 2) {
            tiles.load<5>(second);
            tiles.multiply_add<2, 5, 6>();
            tiles.multiply_add<3, 5, 7>();
        }
    }
    tiles.store<0>(to, STRIDE);
    tiles.store<1>(to + AMX_BYTES, STRIDE);
    if constexpr (ROW_TILES == 2) {
        tiles.store<2>(to + AMX_ROWS * STRIDE, STRIDE);
        tiles.store<3>(to + AMX_ROWS * STRIDE + AMX_BYTES, STRIDE);
    }
}

}  // namespace fusion_edge

#pragma GCC pop_options
