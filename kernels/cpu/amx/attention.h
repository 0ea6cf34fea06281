// Attention of many rows on bfloat16 tiles: blocks of keys, online softmax (https://arxiv.org/abs/2205.14135).
//
// Scores are transposed, [keys, queries], as are results, [channels, queries]: maxima, sums and rescaling go along
// registers of 16 queries, and weights of pairs of keys are the tiles that values are multiplied with.

#pragma once

#include "../generic/attention_flash.h"
#include "tiles.h"

namespace fusion_edge::SIMD::amx_attention {

constexpr size_t SIDES = 2;                   // tiles of queries, and of keys in a step
constexpr size_t QUERIES = SIDES * AMX_ROWS;  // rows that share a pass over keys and values
constexpr size_t STEP = AMX_BYTES / 2;        // bfloat16 in a tile's row: channels (scores) or keys (results)
constexpr size_t BLOCK_STEPS = 16;            // of a block of keys, whose scores stay in the L2 cache
constexpr size_t STRIDE = QUERIES * sizeof(float);  // bytes, of scores and results
constexpr size_t MAX_SUM_TILES = 6;                 // beside one of values and one of weights
static_assert(STEP == SIDES * AMX_ROWS && AMX_ROWS == LANES);

// Sizes of a head's packed keys, tiles [steps, SIDES, depth], and of the values after them, [steps, channels].
struct PackedSizes {
    size_t depth, channels, steps;  // tiles of a key; tiles of a result's channels; STEP keys each

    PackedSizes(size_t count, size_t width)
        : depth((width + STEP - 1) / STEP),
          channels((width + AMX_ROWS - 1) / AMX_ROWS),
          steps((count + STEP - 1) / STEP) {}

    size_t key_bytes(size_t steps) const { return steps * SIDES * depth * AMX_TILE; }
    size_t value_bytes(size_t steps) const { return steps * channels * AMX_TILE; }
};

// sums + both bfloat16 of each word.
[[gnu::always_inline]] inline __m512 add_bfloat16_pairs(__m512 sums, __m512i words) {
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(words), "v"(ones));
    return sums;
}

// 32 channels of a row from `channel` on, zeros after its end.
template <typename T>
[[gnu::always_inline]] inline __m512i load_channels(const T* row, size_t channel, size_t width) {
    const size_t high = channel + LANES < width ? width - channel - LANES : 0;
    return to_bfloat16(load(row + channel, width - channel), load(row + channel + LANES, high));
}

// Packs up to 32 keys, zeros after them.
template <typename T>
void pack_keys(const T* rows, size_t stride, size_t count, size_t width, uint8_t* to) {
    const size_t depth = (width + STEP - 1) / STEP;
    for (size_t i = 0; i < STEP; ++i)
        for (size_t step = 0; step < depth; ++step) {
            const __m512i key = i < count ? load_channels(rows + i * stride, step * STEP, width) : __m512i{};
            _mm512_store_si512(to + (i / AMX_ROWS * depth + step) * AMX_TILE + i % AMX_ROWS * AMX_BYTES, key);
        }
}

[[gnu::always_inline]] inline void store_transposed(__m512i* words, uint8_t* to) {
    transpose(words);
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) _mm512_store_si512(to + i * AMX_BYTES, words[i]);
}

// Packs the values of up to 32 keys, zeros after them.
template <typename T>
void pack_values(const T* rows, size_t stride, size_t count, size_t width, uint8_t* to) {
    for (size_t channel = 0; channel < width; channel += AMX_ROWS, to += AMX_TILE) {
        __m512i words[LANES];
        const auto values = [&](size_t i) __attribute__((always_inline)) {
            return load(rows + i * stride + channel, i < count ? width - channel : 0);
        };
#pragma GCC unroll 16
        for (size_t i = 0; i < LANES; ++i) words[i] = to_bfloat16_pairs(values(2 * i), values(2 * i + 1));
        store_transposed(words, to);
    }
}

// 2^x with a relative error of 9e-5, below that of rounding to bfloat16: 2^floor(x) times the minimax polynomial of
// degree 3, of which `constant` is the last term. With 1, 2^0 is exactly 1.
[[gnu::always_inline]] inline __m512 fast_exp2(__m512 x, float constant) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    __m512 power = _mm512_set1_ps(0.07706704f);
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.227644995f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.695116758f));
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(constant));
    return _mm512_scalef_ps(power, x);
}

// Words of 2^low and 2^high as bfloat16, rounded to nearest: half of its last digit is added to the polynomial, and the
// lower half of the float32 cut off.
[[gnu::always_inline]] inline __m512i exp2_pairs(__m512 low, __m512 high) {
    constexpr float ROUNDED_UP = 1 + 0x1p-8f;
    constexpr __mmask32 LOW = 0x55555555;
    const __m512i words = _mm512_castps_si512(fast_exp2(high, ROUNDED_UP));
    return _mm512_mask_mov_epi16(words, LOW, _mm512_srli_epi32(_mm512_castps_si512(fast_exp2(low, ROUNDED_UP)), 16));
}

// Up to 32 query rows and their state between blocks of keys.
struct alignas(64) Rows {
    uint8_t queries[MAX_HEAD_WIDTH / STEP * SIDES * AMX_TILE];  // tiles [depth, SIDES] of pairs of channels
    float scores[BLOCK_STEPS * STEP * QUERIES];                 // [keys of a block, queries]
    uint8_t weights[SIDES * BLOCK_STEPS * AMX_TILE];            // tiles [SIDES, steps] of pairs of keys
    float results[MAX_HEAD_WIDTH * QUERIES];                    // [channels, queries], not divided by `sums`
    __m512i visible[SIDES];                                     // number of keys
    __m512 largest[SIDES];                                      // scores in the block
    __m512 reference[SIDES];                                    // scores of weight 1
    __m512 sums[SIDES];                                         // of weights
};

// The attention of a head on this thread's tiles.
class Head {
  public:
    Head(const uint8_t* packed, const float* bias, size_t count, size_t width)
        : sizes_(count, width),
          keys_(packed),
          values_(packed + sizes_.key_bytes(sizes_.steps)),
          bias_(bias),
          count_(count),
          width_(width) {
        static thread_local Scratch<Rows> memory;
        rows_ = memory.of(1);
    }

    void attend(const QueryRows& rows, size_t first, size_t count, const float* value_scales) {
        read(rows, first, count);
        for (size_t step = 0; step < steps_; step += BLOCK_STEPS) {
            const size_t steps = std::min(BLOCK_STEPS, steps_ - step);
            for (size_t i = 0; i <= steps; ++i) {  // a step behind the tiles, which take longer
                if (i < steps) multiply_keys(step + i, rows_->scores + i * STEP * QUERIES);
                prefetch_results(rows, first, count, 2 * (step + i));
                if (i > 0) find_largest(step + i - 1, rows_->scores + (i - 1) * STEP * QUERIES);
            }
            for (size_t side = 0; side < SIDES; ++side) {
                raise_reference(side);
                add_values(side, step, steps);
            }
        }
        write(rows, first, count, value_scales);
    }

  private:
    // Reads query rows. Those after the last one are zero and see what it sees.
    void read(const QueryRows& rows, size_t first, size_t count) {
        alignas(64) static thread_local float query[QUERIES][MAX_HEAD_WIDTH];
        alignas(64) int32_t visible[QUERIES];
        for (size_t i = 0; i < QUERIES; ++i) {
            if (i < count) rows.query(first + i, query[i]);
            else std::fill_n(query[i], width_, 0.0f);
            visible[i] = int32_t(rows.visible(first + std::min(i, count - 1)));
        }
        fewest_visible_ = visible[0];
        steps_ = (visible[QUERIES - 1] + STEP - 1) / STEP;
        for (size_t side = 0; side < SIDES; ++side) {
            for (size_t step = 0; step < sizes_.depth; ++step) {
                __m512i words[LANES];
                for (size_t i = 0; i < LANES; ++i)
                    words[i] = load_channels(query[side * LANES + i], step * STEP, width_);
                store_transposed(words, rows_->queries + (step * SIDES + side) * AMX_TILE);
            }
            rows_->visible[side] = _mm512_load_si512(visible + side * LANES);
            rows_->largest[side] = rows_->reference[side] = _mm512_set1_ps(MIN_SCORE);
            rows_->sums[side] = _mm512_setzero_ps();
        }
        std::fill_n(rows_->results, sizes_.channels * AMX_ROWS * QUERIES, 0.0f);
    }

    // Prefetches the memory of two rows of results.
    void prefetch_results(const QueryRows& rows, size_t first, size_t count, size_t row) const {
        for (size_t i = row; i < std::min(row + 2, count); ++i) {
            const float* const result = rows.result(first + i);
            for (size_t channel = 0; channel < width_; channel += LANES) __builtin_prefetch(result + channel, 1);
            __builtin_prefetch(result + width_ - 1, 1);
        }
    }

    // scores [STEP, QUERIES] = keys * queries, for the keys of a step.
    void multiply_keys(size_t step, float* scores) {
        const uint8_t* keys = keys_ + sizes_.key_bytes(step);
        const uint8_t* const second = keys + sizes_.depth * AMX_TILE;
        tiles_.zero<0>();
        tiles_.zero<1>();
        tiles_.zero<2>();
        tiles_.zero<3>();
        for (size_t i = 0; i < sizes_.depth; ++i) {
            const uint8_t* const queries = rows_->queries + i * SIDES * AMX_TILE;
            tiles_.load<6>(queries);
            tiles_.load<4>(keys + i * AMX_TILE);
            tiles_.multiply_add_bfloat16<0, 4, 6>();
            tiles_.load<7>(queries + AMX_TILE);
            tiles_.multiply_add_bfloat16<1, 4, 7>();
            tiles_.load<5>(second + i * AMX_TILE);
            tiles_.multiply_add_bfloat16<2, 5, 6>();
            tiles_.multiply_add_bfloat16<3, 5, 7>();
        }
        tiles_.store<0>(scores, STRIDE);
        tiles_.store<1>(scores + LANES, STRIDE);
        tiles_.store<2>(scores + AMX_ROWS * QUERIES, STRIDE);
        tiles_.store<3>(scores + AMX_ROWS * QUERIES + LANES, STRIDE);
    }

    // Adds biases to the scores of a step, and replaces those that a query does not see.
    void mask(size_t step, float* scores) const {
        for (size_t i = 0; i < STEP; ++i) {
            const size_t key = step * STEP + i;
            const __m512 bias = _mm512_set1_ps(bias_ && key < count_ ? bias_[key] : 0);
            for (size_t side = 0; side < SIDES; ++side, scores += LANES) {
                const __mmask16 seen = _mm512_cmpgt_epi32_mask(rows_->visible[side], _mm512_set1_epi32(int(key)));
                const __m512 score = _mm512_add_ps(_mm512_load_ps(scores), bias);
                _mm512_store_ps(scores, _mm512_mask_mov_ps(_mm512_set1_ps(MIN_SCORE), seen, score));
            }
        }
    }

    bool has_bias(size_t step) const {
        const float* const end = bias_ + std::min(count_, (step + 1) * STEP);
        return bias_ && std::any_of(bias_ + step * STEP, end, [](float bias) { return bias != 0; });
    }

    void find_largest(size_t step, float* scores) {
        if ((step + 1) * STEP > fewest_visible_ || has_bias(step)) mask(step, scores);
        __m512 largest[SIDES] = {rows_->largest[0], rows_->largest[1]};
        for (size_t i = 0; i < STEP; ++i)
#pragma GCC unroll 2
            for (size_t side = 0; side < SIDES; ++side, scores += LANES)
                largest[side] = _mm512_max_ps(largest[side], _mm512_load_ps(scores));
        for (size_t side = 0; side < SIDES; ++side) rows_->largest[side] = largest[side];
    }

    // Moves references to the largest scores where weights would exceed 2^8, and rescales sums and results.
    void raise_reference(size_t side) {
        constexpr float MAX_POWER = 8;
        const __m512 before = rows_->reference[side], largest = rows_->largest[side];
        const __mmask16 raised =
            _mm512_cmp_ps_mask(largest, _mm512_add_ps(before, _mm512_set1_ps(MAX_POWER)), _CMP_GT_OQ);
        if (!raised) return;
        const __m512 reference = _mm512_mask_mov_ps(before, raised, largest);
        const __m512 factor = fast_exp2(_mm512_sub_ps(before, reference), 1);
        rows_->reference[side] = reference;
        rows_->sums[side] = _mm512_mul_ps(rows_->sums[side], factor);
        float* results = rows_->results + side * LANES;
        for (size_t i = 0; i < width_; ++i, results += QUERIES)
            _mm512_store_ps(results, _mm512_mul_ps(_mm512_load_ps(results), factor));
    }

    // Writes the weights of STEP keys of a side, and adds them to the sums.
    [[gnu::always_inline]] static void weigh(const float* scores, __m512 reference, __m512& sum, uint8_t* weights) {
#pragma GCC unroll 4
        for (size_t i = 0; i < AMX_ROWS; ++i, scores += 2 * QUERIES, weights += AMX_BYTES) {
            const __m512 low = _mm512_sub_ps(_mm512_load_ps(scores), reference);
            const __m512i pairs = exp2_pairs(low, _mm512_sub_ps(_mm512_load_ps(scores + QUERIES), reference));
            sum = add_bfloat16_pairs(sum, pairs);
            _mm512_store_si512(weights, pairs);
        }
    }

    // results += values * weights for channel tiles I from `channels` on and the keys of `steps`. Computes the weights
    // for the first channels.
    template <size_t... I>
    void add_channels(std::index_sequence<I...>, size_t side, size_t channels, size_t step, size_t steps) {
        constexpr int VALUES = MAX_SUM_TILES, WEIGHTS = MAX_SUM_TILES + 1;
        float* const results = rows_->results + channels * AMX_ROWS * QUERIES + side * LANES;
        const float* scores = rows_->scores + side * LANES;
        uint8_t* weights = rows_->weights + side * BLOCK_STEPS * AMX_TILE;
        const uint8_t* values = values_ + sizes_.value_bytes(step) + channels * AMX_TILE;
        const __m512 reference = rows_->reference[side];
        __m512 sum = rows_->sums[side];
        (tiles_.load<I>(results + I * AMX_ROWS * QUERIES, STRIDE), ...);
        for (size_t i = 0; i < steps; ++i) {
            if (channels == 0) weigh(scores + i * STEP * QUERIES, reference, sum, weights);
            tiles_.load<WEIGHTS>(weights);
            ((tiles_.load<VALUES>(values + I * AMX_TILE), tiles_.multiply_add_bfloat16<I, VALUES, WEIGHTS>()), ...);
            weights += AMX_TILE;
            values += sizes_.channels * AMX_TILE;
        }
        rows_->sums[side] = sum;
        (tiles_.store<I>(results + I * AMX_ROWS * QUERIES, STRIDE), ...);
    }

    template <size_t... I>
    static constexpr auto channel_kernels(std::index_sequence<I...>) {
        return std::array{&Head::add_some<I + 1>...};
    }

    template <size_t COUNT>
    void add_some(size_t side, size_t channels, size_t step, size_t steps) {
        add_channels(std::make_index_sequence<COUNT>(), side, channels, step, steps);
    }

    void add_values(size_t side, size_t step, size_t steps) {
        constexpr auto ADD = channel_kernels(std::make_index_sequence<MAX_SUM_TILES>());
        const size_t passes = (sizes_.channels + MAX_SUM_TILES - 1) / MAX_SUM_TILES;
        const size_t most = (sizes_.channels + passes - 1) / passes;
        for (size_t i = 0; i < sizes_.channels; i += most)
            (this->*ADD[std::min(most, sizes_.channels - i) - 1])(side, i, step, steps);
    }

    void write(const QueryRows& rows, size_t first, size_t count, const float* value_scales) const {
        for (size_t side = 0; side < SIDES && side * LANES < count; ++side) {
            const size_t here = std::min(LANES, count - side * LANES);
            float* to[LANES];
            for (size_t i = 0; i < here; ++i) to[i] = rows.result(first + side * LANES + i);
            const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1), rows_->sums[side]);
            for (size_t channel = 0; channel < width_; channel += LANES) {
                const __mmask16 mask = lane_mask(width_ - channel);
                const float* results = rows_->results + channel * QUERIES + side * LANES;
                const __m512 scales = value_scales ? load(value_scales + channel, width_ - channel) : _mm512_set1_ps(1);
                __m512i words[LANES];
                for (size_t i = 0; i < LANES; ++i, results += QUERIES)
                    words[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(results), inverse));
                transpose(words);
                for (size_t i = 0; i < here; ++i)
                    _mm512_mask_storeu_ps(
                        to[i] + channel, mask, _mm512_mul_ps(_mm512_castsi512_ps(words[i]), scales));
            }
        }
    }

    const PackedSizes sizes_;
    const uint8_t *const keys_, *const values_;
    const float* bias_;
    size_t count_, width_;
    size_t fewest_visible_ = 0, steps_ = 0;  // of the rows: keys that all see; steps that any sees
    Rows* rows_;
    AmxTiles tiles_;
};

inline size_t packed_bytes(size_t keys, size_t width) {
    const PackedSizes sizes(keys, width);
    return sizes.key_bytes(sizes.steps) + sizes.value_bytes(sizes.steps);
}

template <typename T>
void pack(const KvHead<T>& head, void* packed) {
    const PackedSizes sizes(head.count, head.width);
    uint8_t* const keys = static_cast<uint8_t*>(packed);
    uint8_t* const values = keys + sizes.key_bytes(sizes.steps);
    for (size_t step = 0; step < sizes.steps; ++step) {
        const size_t start = step * STEP * head.stride, count = head.count - step * STEP;
        pack_keys(head.keys + start, head.stride, count, head.width, keys + sizes.key_bytes(step));
        pack_values(head.values + start, head.stride, count, head.width, values + sizes.value_bytes(step));
    }
}

template <typename T>
void attend(const KvHead<T>& head, const void* packed, const QueryRows& rows, size_t first, size_t end) {
    Head tiled(static_cast<const uint8_t*>(packed), head.bias, head.count, head.width);
    for (size_t row = first; row < end; row += QUERIES)
        tiled.attend(rows, row, std::min(QUERIES, end - row), head.value_scales);
}

template <typename T>
inline constexpr FlashKernel<T> KERNEL = {packed_bytes, pack<T>, attend<T>};

}  // namespace fusion_edge::SIMD::amx_attention

namespace fusion_edge::SIMD {

struct AmxFlash {
    template <typename T>
    static const FlashKernel<T>& kernel(Precision precision) {
        return precision == Precision::BFLOAT16 ? amx_attention::KERNEL<T> : TileFlash::kernel<T>(precision);
    }
};

}  // namespace fusion_edge::SIMD
