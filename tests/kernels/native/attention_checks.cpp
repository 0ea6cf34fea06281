#include <algorithm>
#include <cmath>

#include "checks.h"

namespace fusion_edge::checks {
namespace {

constexpr double BFLOAT16_ROUNDOFF = 0x1p-9;

// Attention of one query to keys that are given one by one.
class Query {
  public:
    // `errors`: absolute error of each channel of the query.
    Query(std::vector<double> query, std::vector<double> errors, double scale, Precision precision)
        : query_(std::move(query)), errors_(std::move(errors)), scale_(scale),
          roundoff_(precision == Precision::BFLOAT16 ? BFLOAT16_ROUNDOFF : ROUNDOFF) {}

    template <typename Key>
    void see(Key key, double bias) {
        double score = 0, error = 0;
        for (size_t i = 0; i < query_.size(); ++i) {
            const double product = std::abs(query_[i] * key(i));
            score += query_[i] * key(i);
            // Each factor is rounded; the query is scaled twice in float32, and products are added in any order.
            error += product * (2 * roundoff_ + double(query_.size() + 8) * ROUNDOFF) + errors_[i] * std::abs(key(i));
        }
        scores_.push_back(score * scale_ + bias);
        score_error_ = std::max(score_error_, error * scale_ + 4 * ROUNDOFF * std::abs(scores_.back()));
    }

    // Adds the result's channels; value(key, channel).
    template <typename Value>
    void attend(Value value, size_t width, Expected& expected) const {
        const double largest = *std::max_element(scores_.begin(), scores_.end());
        double sum = 0;
        for (const double score : scores_) sum += std::exp(score - largest);
        for (size_t i = 0; i < width; ++i) {
            double result = 0, magnitude = 0;
            for (size_t key = 0; key < scores_.size(); ++key) {
                const double term = std::exp(scores_[key] - largest) / sum * value(key, i);
                result += term;
                magnitude += std::abs(term);
            }
            // An error d of the scores is one of 2 d of the weights, which add up to 1. Weights and values are rounded,
            // and added up in blocks that are scaled again.
            const double roundings = 2 * roundoff_ + double(scores_.size() + 16) * ROUNDOFF;
            expected.add(result, (2 * score_error_ + roundings) * magnitude + 1e-37);
        }
    }

  private:
    std::vector<double> query_, errors_;
    double scale_, roundoff_, score_error_ = 0;
    std::vector<double> scores_;
};

void check_multi_head(Checks& checks, Precision precision, size_t width, size_t queries, size_t keys, int mask_kind) {
    Random random(uint32_t(width * 100000 + queries * 1000 + keys + size_t(mask_kind)));
    const size_t batch = keys < 20 ? 2 : 1, heads = 2, row = heads * width, rows = queries + queries / 3;
    MultiHeadParams params{};
    const std::vector<float> qkv = random.normals(batch * std::max(rows, keys) * 3 * row);
    std::vector<int32_t> mask(batch * keys, mask_kind == 2);
    if (mask_kind == 1)
        for (int32_t& value : mask) value = random.integer(0, 2) > 0;
    for (size_t i = 0; i < batch; ++i) mask[i * keys + keys / 2] = mask_kind != 3;
    std::vector<float> result(batch * rows * row, 7);
    params.q = qkv.data();
    params.k = qkv.data() + row;
    params.v = qkv.data() + 2 * row;
    params.key_mask = mask_kind ? mask.data() : nullptr;
    params.result = result.data();
    params.batch = batch;
    params.queries = queries;
    params.keys = keys;
    params.heads = heads;
    params.width = width;
    params.stride = 3 * row;
    params.query_rows = rows;
    params.scale = 1 / std::sqrt(float(width));
    params.masked = mask_kind == 3 ? 0 : -10000;  // equal for all keys, when all are masked
    const std::string name = "attention of " + std::to_string(queries) + " queries, " + std::to_string(keys) +
                             " keys of " + std::to_string(width) + ", mask " + std::to_string(mask_kind) +
                             (precision == Precision::BFLOAT16 ? ", bfloat16" : "");
    checks.run(name, result, [&](const Parallel& parallel) {
        checks.kernels.attend(params, precision, parallel);
        checks.kernels.fill_with_mean(params, parallel);
    });
    Expected expected;
    for (size_t i = 0; i < batch; ++i)
        for (size_t query = 0; query < rows; ++query)
            for (size_t head = 0; head < heads; ++head) {
                const auto at = [&](const float* from, size_t index, size_t channel) {
                    return double(from[index * 3 * row + head * width + channel]);
                };
                const auto value = [&](size_t key, size_t channel) { return at(params.v, i * keys + key, channel); };
                std::vector<double> channels(width), none(width);
                for (size_t j = 0; j < width; ++j) channels[j] = at(params.q, i * rows + query, j);
                const bool attends = query < queries;  // else its result is the mean: equal scores
                Query one(attends ? channels : none, none, params.scale, attends ? precision : Precision::FLOAT32);
                for (size_t key = 0; key < keys; ++key) {
                    const bool masked = attends && params.key_mask && !mask[i * keys + key];
                    const auto channel = [&](size_t j) { return at(params.k, i * keys + key, j); };
                    one.see(channel, masked ? params.masked : 0);
                }
                one.attend(value, width, expected);
            }
    checks.expect_near(name, result.data(), expected);
}

// Operands of causal attention with a cache of T.
template <typename T>
struct Causal {
    CausalParams<T> params{};
    std::vector<float> qkv, cos, sin, key_scales, value_scales, result;
    std::vector<T> past_keys, past_values, keys, values;
    std::string name;

    Causal(size_t width, size_t rotary, size_t heads, size_t kv_heads, size_t past, size_t length, bool in_place) {
        Random random(uint32_t(width * 10000 + past * 100 + length * 10 + heads));
        const size_t capacity = past + length + (past % 3), positions = capacity + 2;
        qkv = random.normals(length * (heads + 2 * kv_heads) * width);
        for (size_t i = 0; i < positions * (rotary / 2); ++i) {
            const float angle = random.uniform(-3, 3);
            cos.push_back(std::cos(angle));
            sin.push_back(std::sin(angle));
        }
        for (size_t i = 0; i < kv_heads * width; ++i) {
            key_scales.push_back(random.uniform(0.01f, 0.03f));
            value_scales.push_back(random.uniform(0.01f, 0.03f));
        }
        past_keys.resize(kv_heads * capacity * width);
        past_values.resize(past_keys.size());
        for (std::vector<T>* cache : {&past_keys, &past_values})
            for (T& value : *cache) value = std::is_same_v<T, int8_t> ? T(random.integer(0, 255)) : T(random.normal());
        keys = past_keys;
        values = past_values;
        if (!in_place) keys.assign(keys.size(), T(9)), values.assign(values.size(), T(9));
        result.resize(length * heads * width);
        const T* const from_keys = in_place ? keys.data() : past_keys.data();
        const T* const from_values = in_place ? values.data() : past_values.data();
        params = {qkv.data(), cos.data(), sin.data(), from_keys, from_values, keys.data(), values.data(),
                  nullptr, nullptr,
                  result.data(), length, past + length, capacity, capacity, heads, kv_heads, width, rotary,
                  1 / std::sqrt(float(width))};
        if (std::is_same_v<T, int8_t>) {
            params.key_scales = key_scales.data();
            params.value_scales = value_scales.data();
        }
        name = std::string(std::is_same_v<T, int8_t> ? "int8" : "float") + " cache, " + std::to_string(length) +
               " tokens after " + std::to_string(past) + ", " + std::to_string(heads) + " heads, " +
               std::to_string(kv_heads) + " of keys, of " + std::to_string(width) + (in_place ? ", in place" : "");
    }

    size_t at(size_t head, size_t token, size_t channel) const {
        return (head * params.capacity + token) * params.width + channel;
    }
    // Head of qkv after the rotation, of a new token. The magnitude bounds the terms of the rotation.
    double rotated(size_t token, size_t head, size_t channel, double* magnitude) const {
        const float* row = qkv.data() + (token * (params.heads + 2 * params.kv_heads) + head) * params.width;
        const size_t half = params.rotary / 2, pair = channel % std::max<size_t>(half, 1);
        *magnitude = 0;
        if (channel >= params.rotary || head >= params.heads + params.kv_heads) return row[channel];
        const size_t angle = (params.total - params.length + token) * half + pair;
        const double x = row[pair], y = row[half + pair], c = cos[angle], s = sin[angle];
        *magnitude = std::abs(x) + std::abs(y);
        return channel < half ? x * c - y * s : y * c + x * s;
    }
    // Checks the result of attention to keys(head, token, channel) and values of the same arguments.
    template <typename Keys, typename Values>
    void check_result(Checks& checks, Precision precision, Keys key, Values value) const {
        Expected expected;
        const size_t width = params.width, past = params.total - params.length;
        const Precision used = params.length == 1 ? Precision::FLOAT32 : precision;
        for (size_t token = 0; token < params.length; ++token)
            for (size_t head = 0; head < params.heads; ++head) {
                const size_t kv = head / (params.heads / params.kv_heads);
                std::vector<double> query(width), errors(width);
                for (size_t i = 0; i < width; ++i) {
                    query[i] = rotated(token, head, i, &errors[i]);
                    errors[i] *= 2 * ROUNDOFF;
                }
                Query one(query, errors, params.scale, used);
                for (size_t i = 0; i < past + token + 1; ++i) one.see([&](size_t j) { return key(kv, i, j); }, 0);
                one.attend([&](size_t i, size_t j) { return value(kv, i, j); }, width, expected);
            }
        checks.expect_near(name, result.data(), expected);
    }
};

template <typename T>
void check_causal(Checks& checks, Precision precision, Causal<T> one) {
    const CausalParams<T>& params = one.params;
    const auto run = [&](const Parallel& parallel) { checks.kernels.attend(params, precision, parallel); };
    checks.run(one.name, one.result, run);
    const size_t past = params.total - params.length;
    const bool in_place = params.past_keys == params.keys, is_int8 = std::is_same_v<T, int8_t>;
    size_t wrong = 0;
    for (size_t head = 0; head < params.kv_heads; ++head)
        for (size_t token = 0; token < params.capacity; ++token)
            for (size_t i = 0; i < params.width; ++i) {
                const size_t at = one.at(head, token, i);
                if (token >= past && token < params.total) {
                    double magnitude, none;
                    const double key = one.rotated(token - past, params.heads + head, i, &magnitude);
                    const double value = one.rotated(token - past, params.heads + params.kv_heads + head, i, &none);
                    const auto is_near = [&](T cached, double exact, double error, const float* scales) {
                        if (!is_int8) return std::abs(double(cached) - exact) <= error;
                        const double quotient = std::clamp(exact / scales[head * params.width + i], -128.0, 127.0);
                        return std::abs(double(cached) - quotient) <= 0.5001;
                    };
                    wrong += !is_near(one.keys[at], key, 2 * ROUNDOFF * magnitude, params.key_scales);
                    wrong += !is_near(one.values[at], value, 0, params.value_scales);
                } else {
                    const bool kept = token < past || in_place;
                    wrong += one.keys[at] != (kept ? one.past_keys[at] : T(0));
                    wrong += one.values[at] != (kept ? one.past_values[at] : T(0));
                }
            }
    checks.expect(wrong == 0, one.name + ": " + std::to_string(wrong) + " wrong values in the cache");
    const auto cached = [&](const std::vector<T>& cache, const float* scales) {
        return [&, scales](size_t head, size_t token, size_t i) {
            return double(cache[one.at(head, token, i)]) * (scales ? scales[head * params.width + i] : 1);
        };
    };
    one.check_result(checks, precision, cached(one.keys, params.key_scales), cached(one.values, params.value_scales));
}

// Prefill: attends to the float32 keys and values, and quantizes them.
void check_prefill(Checks& checks, Precision precision, Causal<int8_t> one) {
    const CausalParams<int8_t>& params = one.params;
    const size_t count = params.kv_heads * params.width;
    std::vector<float> scales(2 * count);
    const CacheQuantization quantization{1.2f / 127, 1e-4f, scales.data(), scales.data() + count};
    const std::string name = "prefill of the " + one.name;
    checks.run(name, one.result, [&](const Parallel& parallel) {
        checks.kernels.prefill_int8_cache(params, quantization, precision, parallel);
    });
    size_t wrong = 0;
    const auto of_head = [&](size_t first) {
        return [&, first](size_t head, size_t token, size_t i) {
            double magnitude;
            return one.rotated(token, first + head, i, &magnitude);
        };
    };
    const auto key = of_head(params.heads), value = of_head(params.heads + params.kv_heads);
    for (size_t head = 0; head < params.kv_heads; ++head)
        for (size_t i = 0; i < params.width; ++i) {
            double largest[2] = {};
            for (size_t token = 0; token < params.length; ++token) {
                largest[0] = std::max(largest[0], std::abs(key(head, token, i)));
                largest[1] = std::max(largest[1], std::abs(value(head, token, i)));
            }
            for (size_t side = 0; side < 2; ++side) {
                const double scale = scales[side * count + head * params.width + i];
                const double exact = std::max(largest[side] * double(quantization.factor), 1e-4);
                wrong += !(std::abs(scale - exact) <= 1e-5 * exact);
                const std::vector<int8_t>& cache = side ? one.values : one.keys;
                const std::vector<int8_t>& before = side ? one.past_values : one.past_keys;
                for (size_t token = 0; token < params.capacity; ++token) {
                    const size_t at = one.at(head, token, i);
                    if (token >= params.length) wrong += cache[at] != before[at];
                    else wrong += !(std::abs(cache[at] - (side ? value : key)(head, token, i) / scale) <= 0.501);
                }
            }
        }
    checks.expect(wrong == 0, name + ": " + std::to_string(wrong) + " wrong scales or values in the cache");
    one.name = name;
    one.check_result(checks, precision, key, value);
}

// A value that is not a number makes the scale of its channel NaN, not of the others.
void check_not_finite(Checks& checks) {
    Causal<int8_t> one(20, 8, 1, 1, 0, 3, false);
    one.qkv[2 * 60 + 40 + 18] = NAN;  // channel 18 of the last token's value
    std::vector<float> scales(40);
    const CacheQuantization quantization{1.2f / 127, 1e-4f, scales.data(), scales.data() + 20};
    checks.kernels.prefill_int8_cache(one.params, quantization, Precision::FLOAT32, run_serially);
    for (size_t i = 0; i < 40; ++i)
        checks.expect(std::isnan(scales[i]) == (i == 38), "scale " + std::to_string(i) + " of a cache with NaN");
}

void check_heads(Checks& checks, Precision precision, size_t width) {
    check_multi_head(checks, precision, width, 1, 1, 0);
    check_multi_head(checks, precision, width, 2, 7, 1);
    check_multi_head(checks, precision, width, 9, 33, 2);
    check_multi_head(checks, precision, width, 7, 20, 3);
    check_multi_head(checks, precision, width, 13, 65, 1);
    const size_t rotary = width == 72 ? 36 : width / 2 * 2;
    check_causal(checks, precision, Causal<float>(width, rotary, 4, 2, 0, 1, false));
    check_causal(checks, precision, Causal<float>(width, rotary, 3, 1, 40, 1, true));
    check_causal(checks, precision, Causal<float>(width, rotary, 2, 2, 5, 18, false));
    check_causal(checks, precision, Causal<float>(width, rotary, 7, 1, 13, 9, true));
    check_causal(checks, precision, Causal<int8_t>(width, rotary, 3, 1, 40, 1, false));
    check_causal(checks, precision, Causal<int8_t>(width, rotary, 4, 2, 5, 9, true));
    check_prefill(checks, precision, Causal<int8_t>(width, rotary, 4, 2, 0, 19, false));
}

}  // namespace

void check_attention(Checks& checks) {
    for (const size_t width : {3, 64, 72, 96, 100, 128, 256}) check_heads(checks, Precision::FLOAT32, width);
    for (const size_t width : {5, 72, 128}) check_heads(checks, Precision::BFLOAT16, width);
    check_multi_head(checks, Precision::FLOAT32, 24, 8, 330, 1);
    check_causal(checks, Precision::FLOAT32, Causal<float>(24, 16, 2, 1, 290, 5, true));
    check_causal(checks, Precision::FLOAT32, Causal<int8_t>(24, 16, 4, 1, 300, 1, true));
    check_not_finite(checks);
}

}  // namespace fusion_edge::checks
