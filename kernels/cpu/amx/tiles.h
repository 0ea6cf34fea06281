// AMX: eight tiles of up to 16 rows by 64 bytes. A product of tiles adds dot products of four bytes to 16 x 16 sums.

#pragma once

#ifdef EMULATE_AMX
#include "emulation.h"
#else
#include "instructions.h"
#endif

namespace fusion_edge::SIMD {

constexpr size_t AMX_ROWS = 16, AMX_BYTES = 64;  // of a tile
constexpr size_t AMX_TILE = AMX_ROWS * AMX_BYTES;

#ifdef EMULATE_AMX  // in tests, on processors without AMX
using Amx = EmulatedTiles;
#else
using Amx = TileInstructions;
#endif

// The tiles of this thread: 0 to 3 for sums, 4 and 5 for rows of `depth` bytes (left factor), 6 and 7 for depth / 4
// rows of 16 words (right factor). Their state is released at the end: it slows context switches.
class AmxTiles {
  public:
    explicit AmxTiles(size_t depth = AMX_BYTES) {
        const uint16_t bytes = uint16_t(depth);
        const uint8_t rows = uint8_t(depth / 4);
        Amx::configure({1, 0, {}, {64, 64, 64, 64, bytes, bytes, 64, 64}, {16, 16, 16, 16, 16, 16, rows, rows}});
    }
    ~AmxTiles() { Amx::release(); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    template <int TILE>
    [[gnu::always_inline]] void zero() { Amx::zero<TILE>(); }
    template <int TILE>
    [[gnu::always_inline]] void load(const void* from, size_t stride = AMX_BYTES) { Amx::load<TILE>(from, stride); }
    template <int TILE>
    [[gnu::always_inline]] void store(void* to, size_t stride) const { Amx::store<TILE>(to, stride); }
    // Adds products of int8 on the left with int8, or uint8 if UNSIGNED, on the right.
    template <int SUMS, int LEFT, int RIGHT, bool UNSIGNED>
    [[gnu::always_inline]] void multiply_add() {
        if constexpr (UNSIGNED) Amx::multiply_signed_unsigned<SUMS, LEFT, RIGHT>();
        else Amx::multiply_signed_signed<SUMS, LEFT, RIGHT>();
    }
    // Adds products of pairs of bfloat16 to float32.
    template <int SUMS, int LEFT, int RIGHT>
    [[gnu::always_inline]] void multiply_add_bfloat16() { Amx::multiply_bfloat16<SUMS, LEFT, RIGHT>(); }
};

}  // namespace fusion_edge::SIMD
