// AMX's tiles in plain C++, to test kernels on processors without them. Results have the same bits, NaN apart
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSSD and TDPBF16PS).

#pragma once

#include <cmath>
#include <cstring>

#include "instructions.h"

namespace fusion_edge::SIMD {

struct EmulatedTiles {
    static void configure(const TileSizes& sizes) { state = {sizes, {}}; }
    static void release() { state = {}; }

    template <int TILE>
    static void zero() { state.tiles[TILE] = {}; }
    template <int TILE>
    static void load(const void* from, size_t stride) {
        zero<TILE>();
        for (size_t row = 0; row < state.sizes.rows[TILE]; ++row)
            std::memcpy(
                state.tiles[TILE].bytes[row], static_cast<const uint8_t*>(from) + row * stride,
                state.sizes.row_bytes[TILE]);
    }
    template <int TILE>
    static void store(void* to, size_t stride) {
        for (size_t row = 0; row < state.sizes.rows[TILE]; ++row)
            std::memcpy(
                static_cast<uint8_t*>(to) + row * stride, state.tiles[TILE].bytes[row], state.sizes.row_bytes[TILE]);
    }

    template <int SUMS, int ROWS, int COLUMNS>
    static void multiply_signed_signed() { multiply_bytes<int8_t, int8_t>(SUMS, ROWS, COLUMNS); }
    template <int SUMS, int ROWS, int COLUMNS>
    static void multiply_signed_unsigned() { multiply_bytes<int8_t, uint8_t>(SUMS, ROWS, COLUMNS); }
    template <int SUMS, int ROWS, int COLUMNS>
    static void multiply_bfloat16() { multiply_bfloat16(SUMS, ROWS, COLUMNS); }

  private:
    struct Tile {
        uint8_t bytes[16][64];

        // Value `index` of a row, of values of type T.
        template <typename T>
        T get(size_t row, size_t index) const {
            T value;
            std::memcpy(&value, bytes[row] + index * sizeof(T), sizeof(T));
            return value;
        }
        template <typename T>
        void set(size_t row, size_t index, T value) { std::memcpy(bytes[row] + index * sizeof(T), &value, sizeof(T)); }
    };
    struct State {
        TileSizes sizes;
        Tile tiles[8];
    };
    static inline thread_local State state;

    // Calls sum(row, column), of words, for each of a tile.
    template <typename Sum>
    static void for_each_sum(int sums, Sum sum) {
        for (size_t row = 0; row < state.sizes.rows[sums]; ++row)
            for (size_t column = 0; column < state.sizes.row_bytes[sums] / 4u; ++column) sum(row, column);
    }

    // A word of a row has four bytes, which the word of a column in the row of its number multiplies.
    template <typename Left, typename Right>
    static void multiply_bytes(int sums, int rows, int columns) {
        for_each_sum(sums, [&](size_t row, size_t column) {
            uint32_t sum = state.tiles[sums].get<uint32_t>(row, column);  // wraps around
            for (size_t i = 0; i < state.sizes.row_bytes[rows]; ++i)
                sum += uint32_t(
                    int32_t(state.tiles[rows].get<Left>(row, i)) *
                    int32_t(state.tiles[columns].get<Right>(i / 4, column * 4 + i % 4)));
            state.tiles[sums].set(row, column, sum);
        });
    }

    // Sums of even and of odd products, one rounding to nearest even for each. Subnormal numbers are zero.
    static void multiply_bfloat16(int sums, int rows, int columns) {
        for_each_sum(sums, [&](size_t row, size_t column) {
            float partial[2] = {};
            for (size_t i = 0; i < state.sizes.row_bytes[rows] / 2u; ++i)
                partial[i % 2] = multiply_add(
                    to_float(state.tiles[rows].get<uint16_t>(row, i)),
                    to_float(state.tiles[columns].get<uint16_t>(i / 2, column * 2 + i % 2)), partial[i % 2]);
            const float both = multiply_add(partial[0], 1, partial[1]);
            const float sum = state.tiles[sums].get<float>(row, column);
            state.tiles[sums].set(row, column, multiply_add(both, 1, sum));
        });
    }

    static float to_float(uint16_t bfloat16) {
        const uint32_t bits = uint32_t(bfloat16) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static constexpr float SMALLEST = 0x1p-126f;  // normal number
    static float without_subnormal(float x) { return std::abs(x) < SMALLEST ? std::copysign(0.0f, x) : x; }
    static float multiply_add(float a, float b, float c) {
        a = without_subnormal(a);
        b = without_subnormal(b);
        c = without_subnormal(c);
        const float result = std::fma(a, b, c);
        if (!(std::abs(result) <= SMALLEST)) return result;
        // A result is subnormal if it is too small after rounding to 24 bits, not to the subnormals' fewer ones.
        const float large = std::fma(a * 0x1p60f, b * 0x1p60f, c * 0x1p120f);
        return std::abs(large) < SMALLEST * 0x1p120f ? std::copysign(0.0f, large) : result;
    }
};

}  // namespace fusion_edge::SIMD
