// 16 lanes in two registers of AVX2. Functions are described in generic/functions.h.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fusion_edge::SIMD {

struct Floats { __m256 low, high; };    // 16 float32
struct Ints { __m256i low, high; };     // 16 int32
using Bytes = Ints;                     // 64 of 8 bits

constexpr size_t LANES = 16, HALF = 8;
constexpr bool HAS_BFLOAT16 = false;
constexpr size_t REGISTERS = 1;  // pairs of registers of outputs in a tile of sums
constexpr size_t TILE_ROWS = 6;  // 12 of the 16 registers are sums
constexpr size_t WORD = 4;       // bytes that are broadcast
#ifdef AVX_VNNI
template <int BITS>
constexpr size_t DOT_WIDTH = 4;  // bytes that vpdpbusd multiplies and adds per lane
#else
template <int BITS>
constexpr size_t DOT_WIDTH = BITS == 8 ? 2 : 4;  // 8 bits: int16, as sums of two products of bytes exceed 16 bits
#endif
constexpr int32_t UNSIGNED_OFFSET = 0;  // products have an unsigned and a signed factor

// Masks of the first `count` lanes, of up to 16.
inline __m256i half_mask(size_t count) {
    alignas(32) static constexpr int32_t LANE_MASKS[2 * HALF] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(LANE_MASKS + HALF - (count < HALF ? count : HALF)));
}
inline Ints lane_mask(size_t count) { return {half_mask(count), half_mask(count < HALF ? 0 : count - HALF)}; }

inline Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + HALF)}; }
inline Floats load(const float* from, size_t count) {
    if (count >= LANES) return load(from);
    const Ints mask = lane_mask(count);
    return {_mm256_maskload_ps(from, mask.low), _mm256_maskload_ps(from + HALF, mask.high)};
}
inline __m256 to_floats(__m256i x) { return _mm256_cvtepi32_ps(x); }
inline Floats to_floats(Ints x) { return {to_floats(x.low), to_floats(x.high)}; }
inline Floats load(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {to_floats(_mm256_cvtepi8_epi32(bytes)), to_floats(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
template <typename T>
__m128i load_part(const T* from, size_t count) {
    alignas(16) T buffer[16 / sizeof(T)] = {};
    std::memcpy(buffer, from, count * sizeof(T));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline Floats load(const int8_t* from, size_t count) {
    if (count >= LANES) return load(from);
    const __m128i bytes = load_part(from, count);
    return {to_floats(_mm256_cvtepi8_epi32(bytes)), to_floats(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Floats load(const uint8_t* from, size_t count) {
    const __m128i bytes = load_part(from, count < LANES ? count : LANES);
    return {to_floats(_mm256_cvtepu8_epi32(bytes)), to_floats(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Floats load_half(const uint16_t* from, size_t count) {
    if (count >= LANES)
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + HALF)))};
    const size_t low = count < HALF ? count : HALF;
    return {_mm256_cvtph_ps(load_part(from, low)), _mm256_cvtph_ps(load_part(from + low, count - low))};
}
inline void store(float* to, Floats x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + HALF, x.high);
}
inline void store(float* to, Floats x, size_t count) {
    if (count >= LANES) return store(to, x);
    const Ints mask = lane_mask(count);
    _mm256_maskstore_ps(to, mask.low, x.low);
    _mm256_maskstore_ps(to + HALF, mask.high, x.high);
}
inline void stream(float* to, Floats x) {
    _mm256_stream_ps(to, x.low);
    _mm256_stream_ps(to + HALF, x.high);
}
inline void finish_streams() { _mm_sfence(); }

inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fms(Floats a, Floats b, Floats c) {
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats round(Floats x) {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, NEAREST), _mm256_round_ps(x.high, NEAREST)};
}
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Floats as_floats(Ints x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints broadcast_int(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline __m256 power_of_two(__m256 exponent) {
    const __m256 least = _mm256_set1_ps(-127);  // becomes 0
    const __m256i biased = _mm256_add_epi32(
        _mm256_cvtps_epi32(_mm256_max_ps(exponent, least)), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline Floats multiply_by_power(Floats x, Floats exponent) {
    return mul(x, {power_of_two(exponent.low), power_of_two(exponent.high)});
}
inline Floats inverse(Floats x) { return div(broadcast(1), x); }
inline __m256 select_negative(__m256 x, __m256 where_negative, __m256 otherwise) {
    return _mm256_blendv_ps(otherwise, where_negative, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}
inline Floats select_negative(Floats x, Floats where_negative, Floats otherwise) {
    return {select_negative(x.low, where_negative.low, otherwise.low),
            select_negative(x.high, where_negative.high, otherwise.high)};
}
inline Floats keep_first(Floats x, size_t count) {
    const Ints mask = lane_mask(count);
    return {_mm256_and_ps(x.low, _mm256_castsi256_ps(mask.low)), _mm256_and_ps(x.high, _mm256_castsi256_ps(mask.high))};
}
inline Floats max_first(Floats largest, Floats x, size_t count) {
    const Ints mask = lane_mask(count);
    const Floats both = max(largest, x);
    return {_mm256_blendv_ps(largest.low, both.low, _mm256_castsi256_ps(mask.low)),
            _mm256_blendv_ps(largest.high, both.high, _mm256_castsi256_ps(mask.high))};
}
inline __m256 max_abs(__m256 largest, __m256 x) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest), magnitude));
}
inline Floats max_abs(Floats largest, Floats x) {
    return {max_abs(largest.low, x.low), max_abs(largest.high, x.high)};
}
inline __m128i halves_max(__m256i x) {
    return _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline float reduce_max_abs(Floats magnitudes) {
    __m128i x = halves_max(_mm256_max_epi32(_mm256_castps_si256(magnitudes.low), _mm256_castps_si256(magnitudes.high)));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1))));
}
inline float reduce_add(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float reduce_max(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline __m256 sum_each_of_eight(const Floats* x) {
    __m256 fours[2];
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i) {
        const auto eight = [&](size_t j) { return _mm256_add_ps(x[4 * i + j].low, x[4 * i + j].high); };
        fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(eight(0), eight(1)), _mm256_hadd_ps(eight(2), eight(3)));
    }
    const __m256 low = _mm256_permute2f128_ps(fours[0], fours[1], 0x20);
    return _mm256_add_ps(low, _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
inline Floats sum_each(const Floats* x) { return {sum_each_of_eight(x), sum_each_of_eight(x + HALF)}; }

inline __m256i* words(void* to) { return static_cast<__m256i*>(to); }
inline const __m256i* words(const void* from) { return static_cast<const __m256i*>(from); }
inline Ints load_ints(const int32_t* from) {
    return {_mm256_loadu_si256(words(from)), _mm256_loadu_si256(words(from + HALF))};
}
inline void store_ints(int32_t* to, Ints x) {
    _mm256_storeu_si256(words(to), x.low);
    _mm256_storeu_si256(words(to + HALF), x.high);
}
inline void store_ints(int32_t* to, Ints x, size_t count) {
    const Ints mask = lane_mask(count);
    _mm256_maskstore_epi32(to, mask.low, x.low);
    _mm256_maskstore_epi32(to + HALF, mask.high, x.high);
}
inline Ints mul_ints(Ints a, Ints b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
inline int32_t reduce_add_ints(Ints x) {
    const __m256i eight = _mm256_add_epi32(x.low, x.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
// 16 int32 as int16, saturated, in order.
inline __m256i to_int16(Ints x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xD8); }
inline __m128i to_int8(Ints x) {
    const __m256i shorts = to_int16(x);
    return _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
}
inline void store_int8(int8_t* to, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_int8(x)); }
inline void store_int8(int8_t* to, Ints x, size_t count) {
    alignas(16) int8_t buffer[LANES];
    store_int8(buffer, x);
    std::memcpy(to, buffer, count < LANES ? count : LANES);
}
inline void store_uint8(uint8_t* to, Ints x) {
    const __m256i shorts = to_int16(x);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

inline Bytes zero_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Bytes broadcast_byte(int8_t value) { return {_mm256_set1_epi8(value), _mm256_set1_epi8(value)}; }
inline Bytes load_bytes(const void* from) {
    return {_mm256_loadu_si256(words(from)), _mm256_loadu_si256(words(from) + 1)};
}
inline Bytes load_bytes(const void* from, size_t count) {
    if (count >= 64) return load_bytes(from);
    alignas(32) uint8_t buffer[64] = {};
    std::memcpy(buffer, from, count);
    return load_bytes(buffer);
}
inline void store_bytes(void* to, Bytes x) {
    _mm256_storeu_si256(words(to), x.low);
    _mm256_storeu_si256(words(to) + 1, x.high);
}
inline Bytes less_offset(Bytes unsigned_values) { return unsigned_values; }
inline Bytes low_halves(Bytes x) {
    const __m256i half = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.low, half), _mm256_and_si256(x.high, half)};
}
inline Bytes high_halves(Bytes x) { return low_halves({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)}); }

#ifdef AVX_VNNI
template <int>
inline __m256i dot(__m256i sums, __m256i unsigned_values, __m256i signed_values) {
    return _mm256_dpbusd_avx_epi32(sums, unsigned_values, signed_values);
}
#else
// int32 sums of two products of int16.
inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}
template <int BITS>
inline __m256i dot(__m256i sums, __m256i unsigned_values, __m256i signed_values) {
    // Two products of up to 15 * 128 fit int16.
    if constexpr (BITS == 4)
        return add_products(sums, _mm256_maddubs_epi16(unsigned_values, signed_values), _mm256_set1_epi16(1));
    // Bytes at even, then at odd places, as int16.
    const __m256i even = _mm256_set1_epi16(255);
    const __m256i signed_even = _mm256_srai_epi16(_mm256_slli_epi16(signed_values, 8), 8);
    sums = add_products(sums, _mm256_and_si256(unsigned_values, even), signed_even);
    return add_products(sums, _mm256_srli_epi16(unsigned_values, 8), _mm256_srai_epi16(signed_values, 8));
}
#endif
template <int BITS>
inline Ints dot(Ints sums, Bytes unsigned_values, Bytes signed_values) {
    return {dot<BITS>(sums.low, unsigned_values.low, signed_values.low),
            dot<BITS>(sums.high, unsigned_values.high, signed_values.high)};
}

// Declared only: HAS_BFLOAT16 is false.
bool has_bfloat16();
Ints to_bfloat16(Floats low, Floats high);
Ints to_bfloat16_pairs(Floats low, Floats high);

// Lane i is factors[i / lanes], of at most 8 factors.
class Spread {
  public:
    explicit Spread(size_t lanes) {
        int32_t index[LANES];
        for (size_t i = 0; i < LANES; ++i) index[i] = int32_t(i / lanes);
        index_ = load_ints(index);
    }
    Floats operator()(const float* factors) const {
        const __m256 eight = _mm256_loadu_ps(factors);
        return {_mm256_permutevar8x32_ps(eight, index_.low), _mm256_permutevar8x32_ps(eight, index_.high)};
    }

  private:
    Ints index_;
};

// Transposes an 8 x 8 matrix of 32-bit words.
[[gnu::always_inline]] inline void transpose(__m256i* rows) {
    __m256i pairs[HALF], fours[HALF];
#pragma GCC unroll 4
    for (size_t i = 0; i < HALF; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (size_t i = 0; i < HALF; i += 4)
#pragma GCC unroll 2
        for (size_t j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
        }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[4 + i], 0x20);
        rows[4 + i] = _mm256_permute2x128_si256(fours[i], fours[4 + i], 0x31);
    }
}

inline void transpose(Ints* rows) {
    __m256i top_left[HALF], top_right[HALF], low_left[HALF], low_right[HALF];
    for (size_t i = 0; i < HALF; ++i) {
        top_left[i] = rows[i].low;
        top_right[i] = rows[i].high;
        low_left[i] = rows[HALF + i].low;
        low_right[i] = rows[HALF + i].high;
    }
    transpose(top_left);
    transpose(top_right);
    transpose(low_left);
    transpose(low_right);
    for (size_t i = 0; i < HALF; ++i) {
        rows[i] = {top_left[i], low_left[i]};
        rows[HALF + i] = {top_right[i], low_right[i]};
    }
}

}  // namespace fusion_edge::SIMD
