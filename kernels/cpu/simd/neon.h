// 16 lanes in four registers of NEON. Functions are described in generic/functions.h.

#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fusion_edge::SIMD {

struct Floats { float32x4_t q[4]; };  // 16 float32
struct Ints { int32x4_t q[4]; };      // 16 int32
using Bytes = Ints;                   // 64 of 8 bits

constexpr size_t LANES = 16, QUARTER = 4;
constexpr bool HAS_BFLOAT16 = false;
constexpr size_t REGISTERS = 1;  // groups of four registers of outputs in a tile of sums
constexpr size_t TILE_ROWS = 6;  // 24 of the 32 registers are sums
constexpr int32_t UNSIGNED_OFFSET = 128;  // both factors are signed

// Applies a function to each register of the operands.
template <typename Result, typename Function, typename... Operands>
[[gnu::always_inline]] inline Result each(Function function, const Operands&... x) {
    return {{function(x.q[0]...), function(x.q[1]...), function(x.q[2]...), function(x.q[3]...)}};
}

inline Floats broadcast(float value) {
    const float32x4_t four = vdupq_n_f32(value);
    return {{four, four, four, four}};
}
inline Ints broadcast_int(int32_t value) {
    const int32x4_t four = vdupq_n_s32(value);
    return {{four, four, four, four}};
}
inline Ints lane_numbers() {
    constexpr int32_t NUMBERS[QUARTER] = {0, 1, 2, 3};
    const int32x4_t first = vld1q_s32(NUMBERS);
    return {{first, vaddq_s32(first, vdupq_n_s32(4)), vaddq_s32(first, vdupq_n_s32(8)),
             vaddq_s32(first, vdupq_n_s32(12))}};
}
// Mask of the first `count` lanes.
inline Ints lane_mask(size_t count) {
    const int32x4_t limit = vdupq_n_s32(int32_t(count < LANES ? count : LANES));
    return each<Ints>([&](int32x4_t lanes) { return vreinterpretq_s32_u32(vcltq_s32(lanes, limit)); }, lane_numbers());
}

// The first `count` of 16 values, or more; then zero.
template <typename T>
struct Part {
    alignas(64) T values[LANES] = {};
    Part(const T* from, size_t count) { std::memcpy(values, from, count * sizeof(T)); }
};

inline Floats load(const float* from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
}
inline Floats load(const float* from, size_t count) {
    return count >= LANES ? load(from) : load(Part<float>(from, count).values);
}
inline Floats to_floats(Ints x) {
    return each<Floats>([](int32x4_t x) { return vcvtq_f32_s32(x); }, x);
}
inline Floats load(const int8_t* from) {
    const int8x16_t bytes = vld1q_s8(from);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return to_floats({{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                       vmovl_high_s16(high)}});
}
inline Floats load(const int8_t* from, size_t count) {
    return count >= LANES ? load(from) : load(Part<int8_t>(from, count).values);
}
inline Floats load(const uint8_t* from, size_t count) {
    const Part<uint8_t> part(from, count < LANES ? count : LANES);
    const uint8x16_t bytes = vld1q_u8(part.values);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}
inline Floats load_half(const uint16_t* from) {
    const auto four = [&](size_t i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))); };
    return {{four(0), four(4), four(8), four(12)}};
}
inline Floats load_half(const uint16_t* from, size_t count) {
    return count >= LANES ? load_half(from) : load_half(Part<uint16_t>(from, count).values);
}
inline void store(float* to, Floats x) {
    for (size_t i = 0; i < 4; ++i) vst1q_f32(to + i * QUARTER, x.q[i]);
}
inline void store(float* to, Floats x, size_t count) {
    if (count >= LANES) return store(to, x);
    alignas(64) float buffer[LANES];
    store(buffer, x);
    std::memcpy(to, buffer, count * sizeof(float));
}
inline void stream(float* to, Floats x) {
    asm("stnp %q1, %q2, [%3]\n\tstnp %q4, %q5, [%3, 32]"
        : "=m"(*reinterpret_cast<float(*)[LANES]>(to))
        : "w"(x.q[0]), "w"(x.q[1]), "r"(to), "w"(x.q[2]), "w"(x.q[3]));
}
inline void finish_streams() {}  // such stores are ordered like others

inline Floats add(Floats a, Floats b) {
    return each<Floats>([](float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }, a, b);
}
inline Floats sub(Floats a, Floats b) {
    return each<Floats>([](float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }, a, b);
}
inline Floats mul(Floats a, Floats b) {
    return each<Floats>([](float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }, a, b);
}
inline Floats div(Floats a, Floats b) {
    return each<Floats>([](float32x4_t a, float32x4_t b) { return vdivq_f32(a, b); }, a, b);
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return each<Floats>([](float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }, a, b, c);
}
inline Floats fnma(Floats a, Floats b, Floats c) {
    return each<Floats>([](float32x4_t a, float32x4_t b, float32x4_t c) { return vfmsq_f32(c, a, b); }, a, b, c);
}
inline Floats fms(Floats a, Floats b, Floats c) {
    const auto four = [](float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(vnegq_f32(c), a, b); };
    return each<Floats>(four, a, b, c);
}
inline Floats min(Floats a, Floats b) {
    return each<Floats>([](float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }, a, b);
}
inline Floats max(Floats a, Floats b) {
    return each<Floats>([](float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }, a, b);
}
inline Floats round(Floats x) {
    return each<Floats>([](float32x4_t x) { return vrndnq_f32(x); }, x);
}
inline Ints to_ints(Floats x) {
    return each<Ints>([](float32x4_t x) { return vcvtnq_s32_f32(x); }, x);
}
inline Ints as_ints(Floats x) {
    return each<Ints>([](float32x4_t x) { return vreinterpretq_s32_f32(x); }, x);
}
inline Floats as_floats(Ints x) {
    return each<Floats>([](int32x4_t x) { return vreinterpretq_f32_s32(x); }, x);
}
inline Ints add_ints(Ints a, Ints b) {
    return each<Ints>([](int32x4_t a, int32x4_t b) { return vaddq_s32(a, b); }, a, b);
}
inline Ints mul_ints(Ints a, Ints b) {
    return each<Ints>([](int32x4_t a, int32x4_t b) { return vmulq_s32(a, b); }, a, b);
}
inline Floats multiply_by_power(Floats x, Floats exponent) {
    const auto four = [](float32x4_t x, float32x4_t exponent) {
        const int32x4_t least = vdupq_n_s32(-127);  // becomes 0
        const int32x4_t biased = vaddq_s32(vmaxq_s32(vcvtnq_s32_f32(exponent), least), vdupq_n_s32(127));
        return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
    };
    return each<Floats>(four, x, exponent);
}
inline Floats inverse(Floats x) { return div(broadcast(1), x); }
inline Floats select_negative(Floats x, Floats where_negative, Floats otherwise) {
    const auto four = [](float32x4_t x, float32x4_t negative, float32x4_t otherwise) {
        return vbslq_f32(vcltzq_f32(x), negative, otherwise);
    };
    return each<Floats>(four, x, where_negative, otherwise);
}
inline Floats select(Ints mask, Floats a, Floats b) {
    const auto four = [](int32x4_t mask, float32x4_t a, float32x4_t b) {
        return vbslq_f32(vreinterpretq_u32_s32(mask), a, b);
    };
    return each<Floats>(four, mask, a, b);
}
inline Floats keep_first(Floats x, size_t count) { return select(lane_mask(count), x, broadcast(0)); }
inline Floats max_first(Floats largest, Floats x, size_t count) {
    return select(lane_mask(count), max(largest, x), largest);
}
inline Floats max_abs(Floats largest, Floats x) {
    const auto four = [](float32x4_t largest, float32x4_t x) {
        const int32x4_t magnitude = vreinterpretq_s32_f32(vabsq_f32(x));
        return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(largest), magnitude));
    };
    return each<Floats>(four, largest, x);
}
inline float reduce_max_abs(Floats magnitudes) {
    const Ints x = as_ints(magnitudes);
    const int32_t bits = vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.q[0], x.q[1]), vmaxq_s32(x.q[2], x.q[3])));
    return vget_lane_f32(vreinterpret_f32_s32(vdup_n_s32(bits)), 0);
}
inline float32x4_t add_quarters(Floats x) { return vaddq_f32(vaddq_f32(x.q[0], x.q[1]), vaddq_f32(x.q[2], x.q[3])); }
inline float reduce_add(Floats x) { return vaddvq_f32(add_quarters(x)); }
inline float reduce_max(Floats x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[2], x.q[3])));
}
inline int32_t reduce_add_ints(Ints x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.q[0], x.q[1]), vaddq_s32(x.q[2], x.q[3])));
}
inline Floats sum_each(const Floats* x) {
    const auto four = [&](size_t i) {
        const float32x4_t low = vpaddq_f32(add_quarters(x[i]), add_quarters(x[i + 1]));
        return vpaddq_f32(low, vpaddq_f32(add_quarters(x[i + 2]), add_quarters(x[i + 3])));
    };
    return {{four(0), four(4), four(8), four(12)}};
}

inline Ints load_ints(const int32_t* from) {
    return {{vld1q_s32(from), vld1q_s32(from + 4), vld1q_s32(from + 8), vld1q_s32(from + 12)}};
}
inline void store_ints(int32_t* to, Ints x) {
    for (size_t i = 0; i < 4; ++i) vst1q_s32(to + i * QUARTER, x.q[i]);
}
inline void store_ints(int32_t* to, Ints x, size_t count) { store(reinterpret_cast<float*>(to), as_floats(x), count); }
// 16 int32 as int16, saturated.
inline int16x8_t to_int16(int32x4_t low, int32x4_t high) { return vqmovn_high_s32(vqmovn_s32(low), high); }
inline void store_int8(int8_t* to, Ints x) {
    vst1q_s8(to, vqmovn_high_s16(vqmovn_s16(to_int16(x.q[0], x.q[1])), to_int16(x.q[2], x.q[3])));
}
inline void store_int8(int8_t* to, Ints x, size_t count) {
    alignas(16) int8_t buffer[LANES];
    store_int8(buffer, x);
    std::memcpy(to, buffer, count < LANES ? count : LANES);
}
inline void store_uint8(uint8_t* to, Ints x) {
    vst1q_u8(to, vqmovun_high_s16(vqmovun_s16(to_int16(x.q[0], x.q[1])), to_int16(x.q[2], x.q[3])));
}

inline int8x16_t as_bytes(int32x4_t x) { return vreinterpretq_s8_s32(x); }
inline int32x4_t as_words(uint8x16_t x) { return vreinterpretq_s32_u8(x); }
inline Bytes zero_bytes() { return broadcast_int(0); }
inline Bytes broadcast_byte(int8_t value) { return broadcast_int(0x01010101 * uint8_t(value)); }
inline Bytes load_bytes(const void* from) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    return {{as_words(vld1q_u8(bytes)), as_words(vld1q_u8(bytes + 16)), as_words(vld1q_u8(bytes + 32)),
             as_words(vld1q_u8(bytes + 48))}};
}
inline Bytes load_bytes(const void* from, size_t count) {
    if (count >= sizeof(Bytes)) return load_bytes(from);
    alignas(64) uint8_t buffer[sizeof(Bytes)] = {};
    std::memcpy(buffer, from, count);
    return load_bytes(buffer);
}
inline void store_bytes(void* to, Bytes x) {
    for (size_t i = 0; i < 4; ++i) vst1q_s8(static_cast<int8_t*>(to) + i * 16, as_bytes(x.q[i]));
}
inline Bytes less_offset(Bytes unsigned_values) {
    return each<Bytes>([](int32x4_t x) { return veorq_s32(x, vdupq_n_s32(0x80808080)); }, unsigned_values);
}
inline Bytes low_halves(Bytes x) {
    return each<Bytes>([](int32x4_t x) { return vandq_s32(x, vdupq_n_s32(0x0F0F0F0F)); }, x);
}
inline Bytes high_halves(Bytes x) {
    return each<Bytes>([](int32x4_t x) { return as_words(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }, x);
}
template <int>
inline Ints dot(Ints sums, Bytes unsigned_values, Bytes signed_values) {
    const auto four = [](int32x4_t sums, int32x4_t a, int32x4_t b) {
        return vdotq_s32(sums, as_bytes(a), as_bytes(b));
    };
    return each<Ints>(four, sums, unsigned_values, signed_values);
}

// Declared only: HAS_BFLOAT16 is false.
bool has_bfloat16();
Ints to_bfloat16(Floats low, Floats high);
Ints to_bfloat16_pairs(Floats low, Floats high);

// Lane i is factors[i / lanes], of at most 8 factors.
class Spread {
  public:
    explicit Spread(size_t lanes) {
        uint8_t bytes[4 * LANES];
        for (size_t i = 0; i < 4 * LANES; ++i) bytes[i] = uint8_t(i / 4 / lanes * 4 + i % 4);
        bytes_ = load_bytes(bytes);
    }
    Floats operator()(const float* factors) const {
        const uint8_t* from = reinterpret_cast<const uint8_t*>(factors);
        const uint8x16x2_t eight = {{vld1q_u8(from), vld1q_u8(from + 16)}};
        const auto four = [&](int32x4_t bytes) {
            return vreinterpretq_f32_u8(vqtbl2q_u8(eight, vreinterpretq_u8_s32(bytes)));
        };
        return each<Floats>(four, bytes_);
    }

  private:
    Bytes bytes_;
};

// Transposes a 4 x 4 matrix of words, in register `from` of four rows, to register `to` of four others.
[[gnu::always_inline]] inline void transpose(const Ints* rows, size_t from, Ints* columns, size_t to) {
    const auto pairs = [](int32x4_t x) { return vreinterpretq_s64_s32(x); };
    const auto even = [&](size_t i) { return pairs(vtrn1q_s32(rows[i].q[from], rows[i + 1].q[from])); };
    const auto odd = [&](size_t i) { return pairs(vtrn2q_s32(rows[i].q[from], rows[i + 1].q[from])); };
    columns[0].q[to] = vreinterpretq_s32_s64(vtrn1q_s64(even(0), even(2)));
    columns[1].q[to] = vreinterpretq_s32_s64(vtrn1q_s64(odd(0), odd(2)));
    columns[2].q[to] = vreinterpretq_s32_s64(vtrn2q_s64(even(0), even(2)));
    columns[3].q[to] = vreinterpretq_s32_s64(vtrn2q_s64(odd(0), odd(2)));
}

inline void transpose(Ints* rows) {
    Ints columns[LANES];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) transpose(rows + i * QUARTER, j, columns + j * QUARTER, i);
    for (size_t i = 0; i < LANES; ++i) rows[i] = columns[i];
}

}  // namespace fusion_edge::SIMD
