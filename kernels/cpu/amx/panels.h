// Weights as AMX's left factor: int8 panels of 32 outputs, two tiles.

#pragma once

#include "rows.h"

namespace fusion_edge::SIMD::amx_gemm {

constexpr size_t AMX_SIDES = 2;                     // tiles of a panel
constexpr size_t AMX_PANEL = AMX_SIDES * AMX_ROWS;  // outputs
// Bytes from a step of a panel to the next. With a line more, steps of a row fall into different sets of the caches.
constexpr size_t AMX_STEP = AMX_SIDES * AMX_TILE + 64;

constexpr size_t CHUNK_INPUTS = 2 * CHUNK;  // of 4-bit weights
constexpr size_t CHUNK_GROUPS = 8;          // at most: groups of 16 inputs
constexpr float RATIO_ONE = 1 << 11;        // a ratio is below 16
constexpr int OFFSET_ONE = 1 << 4;          // RATIO_ONE * OFFSET_ONE = 2^15, by which vpmulhrsw divides

// Largest lane among each `count` lanes, a power of two.
inline __m512 largest_of(__m512 lanes, size_t count) {
    const __m512i indices = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (size_t i = 1; i < count; i *= 2)
        lanes = max_abs(lanes, _mm512_permutexvar_ps(_mm512_xor_si512(indices, _mm512_set1_epi32(int(i))), lanes));
    return lanes;
}

// Byte indices of four words, each for a quarter of a register.
inline __m512i quarters(int a, int b, int c, int d) {
    const __m512i words = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
    return _mm512_add_epi16(_mm512_mullo_epi32(words, _mm512_set1_epi32(0x2020202)), _mm512_set1_epi16(0x100));
}

// Indices of the group of each 16 bytes of a chunk; with groups of 16 inputs, of the first eight bytes.
inline __m512i groups_of_chunk(size_t group_size) {
    switch (group_size) {
        case 16: return quarters(0, 2, 4, 6);
        case 32: return quarters(0, 1, 2, 3);
        case 64: return quarters(0, 0, 1, 1);
        default: return quarters(0, 0, 0, 0);
    }
}

// The nibbles of a row and what requantizes them: value = (nibble - zero point) * ratio, in multiples of 1 / RATIO_ONE
// and rounded half up.
struct Nibbles {
    const uint8_t* values;
    size_t bytes, group_size, prefetch_distance;
    const int16_t *ratios, *offsets;  // [groups]: ratio * RATIO_ONE, zero point * OFFSET_ONE
};

// Tables of the int8 values of 16 nibbles, one in each quarter, for its group.
template <bool SYMMETRIC>
[[gnu::always_inline]] inline __m512i requantize(const Nibbles& nibbles, size_t group, __m512i groups) {
    const auto load = [&](const int16_t* words) __attribute__((always_inline)) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + group));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(all), groups);
    };
    __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi16(-128, -112, -96, -80, -64, -48, -32, -16));
    __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 16, 32, 48, 64, 80, 96, 112));
    if constexpr (!SYMMETRIC) {
        const __m512i offset = load(nibbles.offsets);
        low = _mm512_sub_epi16(low, offset);
        high = _mm512_sub_epi16(high, offset);
    }
    const __m512i ratio = load(nibbles.ratios);
    return _mm512_packs_epi16(_mm512_mulhrs_epi16(low, ratio), _mm512_mulhrs_epi16(high, ratio));
}

[[gnu::always_inline]] inline __mmask64 chunk_mask(size_t bytes) {
    return bytes >= CHUNK ? ~0ull : (1ull << bytes) - 1;
}

// Unpacks inputs from `start` to `end` to a row of tiles.
template <bool SYMMETRIC, bool HALVES>
void unpack_nibbles(const Nibbles& nibbles, size_t start, size_t end, uint8_t* to) {
    const __m512i half = _mm512_set1_epi8(15), groups = groups_of_chunk(nibbles.group_size);
    const __m512i others = _mm512_add_epi16(groups, _mm512_set1_epi16(0x202));  // of the last eight of 16 bytes
    const size_t shift = __builtin_ctzll(nibbles.group_size);
    const auto unpack = [&](size_t input, __m512i chunk) __attribute__((always_inline)) {
        const __m512i low = _mm512_and_si512(chunk, half), high = _mm512_and_si512(_mm512_srli_epi16(chunk, 4), half);
        __m512i table = requantize<SYMMETRIC>(nibbles, input >> shift, groups);
        __m512i even = _mm512_shuffle_epi8(table, low), odd = _mm512_shuffle_epi8(table, high);
        if constexpr (HALVES) {
            constexpr __mmask64 LAST_EIGHT = 0xFF00FF00FF00FF00;
            table = requantize<SYMMETRIC>(nibbles, input >> shift, others);
            even = _mm512_mask_shuffle_epi8(even, LAST_EIGHT, table, low);
            odd = _mm512_mask_shuffle_epi8(odd, LAST_EIGHT, table, high);
        }
        _mm512_store_si512(to, even);
        _mm512_store_si512(to + AMX_STEP, odd);
        to += 2 * AMX_STEP;
    };
    const uint8_t* const values = nibbles.values;
    size_t input = start;
    const size_t whole = std::min(end, nibbles.bytes / CHUNK * CHUNK_INPUTS);
    for (; input < whole; input += CHUNK_INPUTS) {
        _mm_prefetch(values + input / 2 + nibbles.prefetch_distance, _MM_HINT_T1);
        unpack(input, _mm512_loadu_si512(values + input / 2));
    }
    if (input < end) unpack(input, _mm512_maskz_loadu_epi8(chunk_mask(nibbles.bytes % CHUNK), values + input / 2));
}

// A thread's panels: what scales their sums, and their values, a part of the inputs at a time.
class AmxPanels {
  public:
    // For `panels` panels of outputs from `output` on. Keeps a reference to the weights.
    AmxPanels(const Weights& weights, size_t output, size_t panels);

    // Unpacks inputs from `start` to `end` of panels to tiles [panels, (end - start) / 64 steps of AMX_STEP bytes,
    // AMX_SIDES, 16, 64], in memory that this thread keeps until the next call. Outputs after the last one are
    // undefined.
    const uint8_t* unpack(size_t panel, size_t panels, size_t start, size_t end);

    // [superblocks, AMX_PANEL]: scales of a panel; [1, AMX_PANEL] with static quantization. 0 after the last output.
    const float* scales(size_t panel) const { return scales_ + panel * blocks_ * AMX_PANEL; }
    // The same of 8-bit weights with dynamic quantization: their zero points as int8.
    const float* zero_points(size_t panel) const { return zero_points_ + panel * blocks_ * AMX_PANEL; }
    // [AMX_PANEL], with static quantization, of inputs unpacked so far: minus the activations' zero point times the sum
    // of an output's weights.
    const int32_t* corrections(size_t panel) const { return corrections_ + panel * AMX_PANEL; }

  private:
    void set_scales(size_t index);
    void unpack_row(size_t index, size_t start, size_t end, uint8_t* to) const;
    void unpack_bytes(size_t index, size_t start, size_t end, uint8_t* to);

    const Weights& weights_;
    AmxSteps steps_;
    size_t output_, blocks_;
    size_t groups_;                  // padded
    size_t prefetch_distance_ = 0;  // bytes
    float *scales_, *zero_points_;
    int32_t* corrections_;
    int16_t *ratios_, *offsets_;  // [outputs, groups_]: of 4-bit weights; see `requantize`
};

inline AmxPanels::AmxPanels(const Weights& weights, size_t output, size_t panels)
    : weights_(weights), steps_(weights), output_(output) {
    static thread_local Scratch<float> scales, zero_points;
    static thread_local Scratch<int32_t> corrections;
    static thread_local Scratch<int16_t> ratios, offsets;
    const size_t outputs = panels * AMX_PANEL;
    blocks_ = weights.static_quantization ? 1 : steps_.superblocks();
    groups_ = round_up(weights.blocks(), LANES) + CHUNK_GROUPS;
    scales_ = scales.of(outputs * blocks_);
    zero_points_ = zero_points.of(outputs * blocks_);
    corrections_ = corrections.of(outputs);
    ratios_ = ratios.of(outputs * groups_);
    offsets_ = offsets.of(outputs * groups_);
    std::fill_n(scales_, outputs * blocks_, 0.0f);
    std::fill_n(zero_points_, outputs * blocks_, 0.0f);  // also the padding, whose row sums are 0: 0 * NaN is NaN
    std::fill_n(corrections_, outputs, 0);
    for (size_t i = 0; i < std::min(outputs, weights.outputs - output); ++i) set_scales(i);
}

inline void AmxPanels::set_scales(size_t index) {
    const size_t output = output_ + index, column = index / AMX_PANEL * blocks_ * AMX_PANEL + index % AMX_PANEL;
    float* to = scales_ + column;
    if (weights_.static_quantization) {
        *to = _mm512_cvtss_f32(load_scales(weights_, output, 1)) * weights_.static_quantization->scale;
        return;
    }
    const size_t groups = weights_.blocks(), shared = steps_.superblock / weights_.block_size;
    // The largest int8 levels for a distance of 1 from a zero point, 127 / max(zero point, 15 - zero point).
    const __m512 inverse_levels = _mm512_setr_ps(
        1 / 8.f, 1 / 9.f, 1 / 9.f, 1 / 10.f, 1 / 11.f, 1 / 12.f, 1 / 14.f, 1 / 15.f, 1 / 15.f, 1 / 14.f, 1 / 12.f,
        1 / 11.f, 1 / 10.f, 1 / 9.f, 1 / 9.f, 1 / 8.f);
    for (size_t group = 0; group < groups; group += LANES) {
        const size_t count = std::min(LANES, groups - group);
        const __m512 own = load_scales(weights_, output * groups + group, count);
        const __m512i points = weights_.zero_points ? to_ints(load_zero_points(weights_, output, group))
                                                    : broadcast_int(1 << (weights_.bits - 1));
        __m512 scales = own;
        if (shared > 1) {
            const __m512 least = _mm512_mul_ps(own, _mm512_permutexvar_ps(points, inverse_levels));
            scales = largest_of(_mm512_abs_ps(least), shared);
        }
        alignas(64) float lanes[LANES], zero_points[LANES];
        _mm512_store_ps(lanes, scales);
        for (size_t i = 0; i < count; i += shared, to += AMX_PANEL) *to = lanes[i];
        if (weights_.bits == 4) {
            const __mmask16 any = _mm512_cmp_ps_mask(scales, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            const __m512 ratios = _mm512_mul_ps(_mm512_maskz_div_ps(any, own, scales), _mm512_set1_ps(RATIO_ONE));
            int16_t* const ratio = ratios_ + index * groups_ + group;
            int16_t* const offset = offsets_ + index * groups_ + group;
            const __m512i distances = _mm512_sub_epi32(points, _mm512_set1_epi32(8));
            const __m512i offsets = _mm512_mullo_epi32(distances, _mm512_set1_epi32(OFFSET_ONE));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(ratio), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(ratios)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(offset), _mm512_cvtepi32_epi16(offsets));
        } else if (weights_.zero_points) {
            _mm512_store_ps(zero_points, _mm512_cvtepi32_ps(_mm512_sub_epi32(points, _mm512_set1_epi32(128))));
            for (size_t i = 0; i < count; ++i) zero_points_[column + (group + i) * AMX_PANEL] = zero_points[i];
        }
    }
}

inline void AmxPanels::unpack_row(size_t index, size_t start, size_t end, uint8_t* to) const {
    const size_t bytes = weights_.row_bytes();
    const Nibbles nibbles{
        weights_.values + (output_ + index) * bytes, bytes, weights_.block_size, prefetch_distance_,
        ratios_ + index * groups_, offsets_ + index * groups_};
    constexpr auto UNPACK = std::array{
        std::array{unpack_nibbles<true, false>, unpack_nibbles<true, true>},
        std::array{unpack_nibbles<false, false>, unpack_nibbles<false, true>}};
    UNPACK[weights_.zero_points != nullptr][weights_.block_size == 16](nibbles, start, end, to);
}

inline void AmxPanels::unpack_bytes(size_t index, size_t start, size_t end, uint8_t* to) {
    const size_t bytes = weights_.row_bytes();
    const uint8_t* const from = weights_.values + (output_ + index) * bytes;
    const bool is_static = weights_.static_quantization;
    const __m512i flip = _mm512_set1_epi8(is_static ? 0 : -128), ones = _mm512_set1_epi8(1);
    __m512i totals = _mm512_setzero_si512();
    for (size_t input = start; input < end; input += CHUNK, to += AMX_STEP) {
        _mm_prefetch(from + input + prefetch_distance_, _MM_HINT_T1);
        const __m512i chunk = _mm512_maskz_loadu_epi8(chunk_mask(bytes - input), from + input);
        totals = _mm512_dpbusd_epi32(totals, ones, chunk);
        _mm512_store_si512(to, _mm512_xor_si512(chunk, flip));
    }
    if (!is_static) return;
    if (start == 0) corrections_[index] = 0;
    corrections_[index] -= weights_.static_quantization->zero_point * _mm512_reduce_add_epi32(totals);
}

inline const uint8_t* AmxPanels::unpack(size_t panel, size_t panels, size_t start, size_t end) {
    static thread_local Scratch<uint8_t> memory;
    const size_t size = (end - start) / AMX_BYTES * AMX_STEP, first = panel * AMX_PANEL;
    // The next part is fetched while this one is multiplied; after the last part, the first one of the next panels.
    const size_t next = end < steps_.width ? end : panels * AMX_PANEL * weights_.row_bytes() * 8 / weights_.bits;
    prefetch_distance_ = (next - start) * weights_.bits / 8;
    uint8_t* const values = memory.of(panels * size);
    for (size_t i = 0; i < std::min(panels * AMX_PANEL, weights_.outputs - output_ - first); ++i) {
        uint8_t* to = values + i / AMX_PANEL * size + i / AMX_ROWS % AMX_SIDES * AMX_TILE + i % AMX_ROWS * AMX_BYTES;
        if (weights_.bits == 4) unpack_row(first + i, start, end, to);
        else unpack_bytes(first + i, start, end, to);
    }
    return values;
}

}  // namespace fusion_edge::SIMD::amx_gemm
