// Functions of 16 lanes, over those that each instruction set defines (simd/).
//
// A file of simd/ (or, what depends on the micro-kernel, of micro_kernels/) defines, in the namespace SIMD:
//   Floats, Ints, Bytes         16 float32, 16 int32, 64 of 8 bits (16 words)
//   load, store                 of Floats; with a count, of the first lanes only, the others are zero. Also load of
//                               8-bit integers and load_half of float16
//   stream                      stores past the caches; finish_streams makes it visible to other threads
//   add, sub, mul, div, fma (a b + c), fms (a b - c), fnma (c - a b), min, max (the second operand if one is NaN),
//                               round (to nearest even), inverse, multiply_by_power (x 2^n for an integral n <= 0),
//                               select_negative, keep_first (zero after them)
//   max_first                   maximum over the first lanes; the others keep the first operand
//   max_abs (for a first operand >= 0; unlike max keeps NaN, which is larger than all), reduce_max_abs, reduce_add, ...
//   sum_each                    lane i is the sum of the lanes of the operand i, of 16
//   to_ints (round to nearest even), store_int8 and store_uint8 (saturate)
//   low_halves, high_halves     of Bytes: four bits of each
//   dot<BITS>                   adds to each lane the products of its bytes; unsigned times signed. With 4 BITS the
//                               unsigned are below 16
//   Spread, transpose           of 16 x 16 words
//   REGISTERS, TILE_ROWS        size of a tile of sums that fits the registers: REGISTERS * 16 outputs, TILE_ROWS rows
//   WORD                        bytes of a word of a tile, what a micro-kernel reads of a row at a time: 4 or 8
//   DOT_WIDTH<BITS>             8-bit inputs in a word of a tile, each of WORD / DOT_WIDTH bytes
//   UNSIGNED_OFFSET             what is subtracted from unsigned bytes because dot takes signed ones only

#pragma once

namespace fusion_edge::SIMD {

constexpr size_t LANE_BYTES = 4;                     // of a lane of Bytes
constexpr float LOG2_E = 1.44269504f;               // e^x = 2^(x log2 e)
constexpr float TWO_ROOT_TWO_OVER_PI = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float MIN_EXPONENT = -160;                 // 2^-160 is 0 in float32; the bound keeps infinities out of exp2

// 2^x for x <= 0 with a relative error of 1e-7: 2^round(x) times the minimax polynomial of degree 5 of 2^f, |f| <= 1/2.
[[gnu::always_inline]] inline Floats exp2(Floats x) {
    const Floats whole = round(x), f = sub(x, whole);
    Floats power = broadcast(0.00132764716f);
    power = fma(power, f, broadcast(0.00967554133f));
    power = fma(power, f, broadcast(0.0555071327f));
    power = fma(power, f, broadcast(0.240221197f));
    power = fma(power, f, broadcast(0.693146967f));
    power = fma(power, f, broadcast(1.00000007f));
    return multiply_by_power(power, whole);
}

// x / (1 + 2^-z), computed from 2^-|z|, which cannot overflow.
[[gnu::always_inline]] inline Floats gate(Floats x, Floats z) {
    const Floats one = broadcast(1), negative_size = min(z, sub(broadcast(0), z));
    const Floats power = exp2(max(negative_size, broadcast(MIN_EXPONENT)));
    return mul(mul(x, select_negative(z, power, one)), inverse(add(one, power)));
}

// x / (1 + e^(-slope x)).
[[gnu::always_inline]] inline Floats swish(Floats x, float slope) {
    return gate(x, mul(x, broadcast(slope * LOG2_E)));
}

// GELU in its tanh form; formula in activations.h.
[[gnu::always_inline]] inline Floats gelu(Floats x) {
    const Floats linear = broadcast(TWO_ROOT_TWO_OVER_PI * LOG2_E);
    const Floats cubic = broadcast(TWO_ROOT_TWO_OVER_PI * LOG2_E * 0.044715f);
    return gate(x, mul(x, fma(mul(x, x), cubic, linear)));
}

}  // namespace fusion_edge::SIMD
