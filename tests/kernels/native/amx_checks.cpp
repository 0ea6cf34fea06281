// The emulation of AMX's tiles against the tiles of a processor that has them.

#include "checks.h"

#ifdef __x86_64__

#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>

#define SIMD tile_checks
#include "amx/emulation.h"

namespace fusion_edge::checks {
namespace {

using namespace SIMD;

constexpr size_t TILE = 1024;  // bytes

// Whether the kernel grants the state of tiles (https://docs.kernel.org/arch/x86/xstate.html).
bool has_tiles() {
    return __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

struct Operands {
    TileSizes sizes{};
    std::vector<uint8_t> sums, rows, columns;
};

// Adds products with each of the instructions to the same sums, and returns the bytes of each result.
template <class Tiles>
std::vector<uint8_t> multiply(const Operands& operands) {
    std::vector<uint8_t> results(3 * TILE);
    Tiles::configure(operands.sizes);
    const auto run = [&](size_t index, auto multiply) {
        Tiles::template load<0>(operands.sums.data(), 64);
        Tiles::template load<4>(operands.rows.data(), 64);
        Tiles::template load<6>(operands.columns.data(), 64);
        multiply();
        Tiles::template store<0>(results.data() + index * TILE, 64);
    };
    run(0, [] { Tiles::template multiply_signed_signed<0, 4, 6>(); });
    run(1, [] { Tiles::template multiply_signed_unsigned<0, 4, 6>(); });
    run(2, [] {
        Tiles::template zero<1>();
        Tiles::template multiply_bfloat16<1, 4, 6>();
        Tiles::template multiply_bfloat16<0, 4, 6>();
    });
    Tiles::release();
    return results;
}

// Range of exponents of floating-point numbers, biased by 127.
struct Exponents { size_t first, last; };

// Random numbers of 2 bytes (bfloat16) or 4 (float32).
std::vector<uint8_t> random_numbers(Random& random, size_t size, Exponents exponents) {
    std::vector<uint8_t> bytes = random.bytes(TILE);
    for (size_t i = 0; i < TILE; i += size) {
        const size_t exponent = random.integer(exponents.first, exponents.last);
        bytes[i + size - 1] = uint8_t(random.integer(0, 1) << 7 | exponent >> 1);
        bytes[i + size - 2] = uint8_t((exponent & 1) << 7 | (bytes[i + size - 2] & 127));
    }
    return bytes;
}

// Exponents of rows, columns and sums for bfloat16.
struct Kind { Exponents rows, columns, sums; };
constexpr Kind KINDS[] = {
    {{120, 132}, {120, 132}, {120, 132}},  // usual ones
    {{57, 69}, {57, 69}, {0, 12}},         // products near the smallest normal number, 2^-126
    {{0, 2}, {180, 190}, {50, 70}},        // subnormal factors of large ones
    {{180, 190}, {0, 2}, {50, 70}},
    {{50, 52}, {50, 52}, {0, 0}},          // 2^-126 plus products that are less than half of the last bit
    {{0, 255}, {0, 255}, {0, 255}},        // also infinite and NaN
};
constexpr size_t KIND_COUNT = sizeof KINDS / sizeof *KINDS, AT_THE_LIMIT = 4;

void set_numbers(Operands& operands, Random& random, size_t kind) {
    operands.rows = random_numbers(random, 2, KINDS[kind].rows);
    operands.columns = random_numbers(random, 2, KINDS[kind].columns);
    operands.sums = random_numbers(random, 4, KINDS[kind].sums);
    if (kind != AT_THE_LIMIT) return;
    constexpr uint16_t ROOT = 64 << 7;  // 2^-63
    for (size_t i = 0; i < 32; ++i) {
        std::memcpy(&operands.columns[i * 2], &ROOT, 2);
        std::memcpy(&operands.rows[i / 2 * 64 + i % 2 * 2], &ROOT, 2);
    }
}

bool same(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, size_t first, size_t count) {
    for (size_t i = first; i < first + count; i += 4) {
        float x, y;
        std::memcpy(&x, &a[i], 4);
        std::memcpy(&y, &b[i], 4);
        if (std::memcmp(&a[i], &b[i], 4) && !(std::isnan(x) && std::isnan(y))) return false;
    }
    return true;
}

}  // namespace

size_t check_tile_emulation() {
    if (!has_tiles()) {
        std::printf("AMX's tiles: not on this processor\n");
        return 0;
    }
    size_t failures = 0;
    constexpr size_t CASES = 600;
    for (uint32_t seed = 0; seed < CASES; ++seed) {
        Random random(seed);
        Operands operands;
        const size_t rows = random.integer(1, 16), depth = random.integer(1, 16), columns = random.integer(1, 16);
        operands.sizes.palette = 1;
        for (const int tile : {0, 1}) {
            operands.sizes.rows[tile] = uint8_t(rows);
            operands.sizes.row_bytes[tile] = uint16_t(4 * columns);
        }
        operands.sizes.rows[4] = uint8_t(rows);
        operands.sizes.row_bytes[4] = uint16_t(4 * depth);
        operands.sizes.rows[6] = uint8_t(depth);
        operands.sizes.row_bytes[6] = uint16_t(4 * columns);
        set_numbers(operands, random, seed % KIND_COUNT);
        const std::vector<uint8_t> ours = multiply<EmulatedTiles>(operands);
        const std::vector<uint8_t> real = multiply<TileInstructions>(operands);
        if (std::memcmp(ours.data(), real.data(), 2 * TILE) == 0 && same(ours, real, 2 * TILE, TILE)) continue;
        ++failures;
        std::printf("FAILED: emulated tiles of case %u differ\n", seed);
    }
    std::printf("AMX's tiles: %zu cases, %zu failures\n", CASES, failures);
    return failures;
}

}  // namespace fusion_edge::checks

#else

namespace fusion_edge::checks {

size_t check_tile_emulation() { return 0; }

}  // namespace fusion_edge::checks

#endif
