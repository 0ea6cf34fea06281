// 16 lanes in one register of AVX-512. Functions are described in generic/functions.h.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fusion_edge::SIMD {

using Floats = __m512;   // 16 float32
using Ints = __m512i;    // 16 int32
using Bytes = __m512i;   // 64 of 8 bits

constexpr size_t LANES = 16;
constexpr bool HAS_BFLOAT16 = true;  // where has_bfloat16 says so
constexpr size_t REGISTERS = 3;      // of outputs in a tile of sums: with 8 rows, 24 of the 32 registers are sums
constexpr size_t TILE_ROWS = 8;
constexpr size_t WORD = 4;            // bytes that are broadcast
template <int BITS>
constexpr size_t DOT_WIDTH = 4;          // bytes that vpdpbusd multiplies and adds per lane
constexpr int32_t UNSIGNED_OFFSET = 0;   // vpdpbusd takes an unsigned and a signed operand

// Mask of the first `count` lanes.
inline __mmask16 lane_mask(size_t count) { return count >= LANES ? 0xFFFF : (1u << count) - 1; }
inline __mmask64 byte_mask(size_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, size_t count) { return _mm512_maskz_loadu_ps(lane_mask(count), from); }
inline Floats load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Floats load(const int8_t* from, size_t count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lane_mask(count), from)));
}
inline Floats load(const uint8_t* from, size_t count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lane_mask(count), from)));
}
inline Floats load_half(const uint16_t* from, size_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(count), from));
}
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Floats x, size_t count) { _mm512_mask_storeu_ps(to, lane_mask(count), x); }
inline void stream(float* to, Floats x) { _mm512_stream_ps(to, x); }
inline void finish_streams() { _mm_sfence(); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats multiply_by_power(Floats x, Floats exponent) { return _mm512_scalef_ps(x, exponent); }
inline Floats inverse(Floats x) {
    const Floats near = _mm512_rcp14_ps(x);
    return mul(near, fnma(x, near, broadcast(2)));  // Newton step
}
inline Floats select_negative(Floats x, Floats where_negative, Floats otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), where_negative);
}
inline Floats keep_first(Floats x, size_t count) { return _mm512_maskz_mov_ps(lane_mask(count), x); }
inline Floats max_first(Floats largest, Floats x, size_t count) {
    return _mm512_mask_max_ps(largest, lane_mask(count), largest, x);
}
inline Floats max_abs(Floats largest, Floats x) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), _mm512_castps_si512(_mm512_abs_ps(x))));
}
inline float reduce_max_abs(Floats magnitudes) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(magnitudes)))));
}
inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }

inline Floats sum_halves(Floats a, Floats b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
inline Floats sum_each(const Floats* x) {
    Floats pairs[8], fours[4];
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i)
        pairs[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return sum_halves(sum_halves(fours[0], fours[1]), sum_halves(fours[2], fours[3]));
}

inline Ints broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store_ints(int32_t* to, Ints x) { _mm512_storeu_si512(to, x); }
inline void store_ints(int32_t* to, Ints x, size_t count) { _mm512_mask_storeu_epi32(to, lane_mask(count), x); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints mul_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline int32_t reduce_add_ints(Ints x) { return _mm512_reduce_add_epi32(x); }
inline void store_int8(int8_t* to, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(x));
}
inline void store_int8(int8_t* to, Ints x, size_t count) {
    _mm_mask_storeu_epi8(to, lane_mask(count), _mm512_cvtsepi32_epi8(x));
}
inline void store_uint8(uint8_t* to, Ints x) {
    const Ints positive = _mm512_max_epi32(x, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(positive));
}

inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes broadcast_byte(int8_t value) { return _mm512_set1_epi8(value); }
inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline Bytes load_bytes(const void* from, size_t count) { return _mm512_maskz_loadu_epi8(byte_mask(count), from); }
inline void store_bytes(void* to, Bytes x) { _mm512_storeu_si512(to, x); }
inline Bytes less_offset(Bytes unsigned_values) { return unsigned_values; }
inline Bytes low_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_halves(Bytes x) { return low_halves(_mm512_srli_epi16(x, 4)); }
template <int BITS>
inline Ints dot(Ints sums, Bytes unsigned_values, Bytes signed_values) {
    return _mm512_dpbusd_epi32(sums, unsigned_values, signed_values);
}

// Lane i is factors[i / lanes].
class Spread {
  public:
    explicit Spread(size_t lanes)
        : index_(_mm512_srl_epi32(
              _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
              _mm_cvtsi32_si128(__builtin_ctzll(lanes)))) {}
    Floats operator()(const float* factors) const {
        return _mm512_permutexvar_ps(index_, _mm512_loadu_ps(factors));
    }

  private:
    __m512i index_;
};

[[gnu::always_inline]] inline void transpose(Ints* rows) {
    Ints other[LANES];
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (size_t j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
        }
    // Quarter c of rows[4 a + b] now holds word 4 c + b of rows 4 a ... 4 a + 3.
#pragma GCC unroll 4
    for (size_t b = 0; b < 4; ++b) {
        const Ints low = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
        const Ints high = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
        const Ints low_odd = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xDD);
        const Ints high_odd = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xDD);
        other[b] = _mm512_shuffle_i32x4(low, high, 0x88);
        other[4 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        other[8 + b] = _mm512_shuffle_i32x4(low, high, 0xDD);
        other[12 + b] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) rows[i] = other[i];
}

inline bool has_bfloat16() {
    static const bool supported = __builtin_cpu_supports("avx512bf16");
    return supported;
}

// 32 floats as bfloat16, rounded to nearest even. Inline assembly: with intrinsics GCC 12 copies each accumulator.
inline Ints to_bfloat16(Floats low, Floats high) {
    Ints rounded;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(low), "v"(high));
    return rounded;
}

// Pairs of bfloat16: lane i has low[i] and high[i].
inline Ints to_bfloat16_pairs(Floats low, Floats high) {
    const Ints pairs = _mm512_or_si512(  // indices 0, 16, 1, 17 ...
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_slli_epi32(
            _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16));
    return _mm512_permutexvar_epi16(pairs, to_bfloat16(low, high));
}

}  // namespace fusion_edge::SIMD
