// What the checks of the kernels share: random operands, threads, and a line for each failure.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace fusion_edge::checks {

constexpr double ROUNDOFF = 0x1p-24;  // largest relative error of a rounding to float32

// Runs the work in order on the calling thread.
void run_serially(size_t count, const std::function<void(size_t)>& body);

// Runs the work on several threads, which take it in turns.
void run_on_threads(size_t count, const std::function<void(size_t)>& body);

// Random numbers, the same on every machine and standard library.
class Random {
  public:
    explicit Random(uint32_t seed) : generator_(seed) {}
    size_t integer(size_t first, size_t last) { return first + generator_() % (last - first + 1); }
    float uniform(float low, float high) { return low + (high - low) * float(generator_() * 0x1p-32); }
    // About normal, of variance 1.
    float normal() { return uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1); }
    std::vector<float> normals(size_t count) {
        std::vector<float> values(count);
        for (float& value : values) value = normal();
        return values;
    }
    std::vector<uint8_t> bytes(size_t count) {
        std::vector<uint8_t> values(count);
        for (uint8_t& value : values) value = uint8_t(generator_());
        return values;
    }

  private:
    std::mt19937 generator_;
};

// What a kernel should return, and by how much it may differ.
struct Expected {
    std::vector<double> values, tolerances;

    void add(double value, double tolerance) {
        values.push_back(value);
        tolerances.push_back(tolerance);
    }
};

// The kernels of a tier and what they got wrong.
class Checks {
  public:
    explicit Checks(const Kernels& kernels) : kernels(kernels) {}

    const Kernels& kernels;

    void expect(bool condition, const std::string& what);
    void expect_near(const std::string& what, const float* actual, const Expected& expected);

    // Calls run(parallel) on one thread and on several: all bytes of `result`, which it writes, must be the same.
    template <typename T, typename Run>
    void run(const std::string& what, std::vector<T>& result, Run run) {
        const std::vector<T> before = result;
        run(Parallel(run_on_threads));
        const std::vector<T> of_threads = result;
        result = before;
        run(Parallel(run_serially));
        expect(std::memcmp(result.data(), of_threads.data(), result.size() * sizeof(T)) == 0, what + ", with threads");
    }

    size_t count() const { return count_; }
    size_t failures() const { return failures_; }

  private:
    size_t count_ = 0, failures_ = 0;
};

// x / (1 + e^(-slope x)), and GELU in its tanh form.
double swish(double x, double slope);
double gelu(double x);

// Largest absolute error of these functions in the kernels: 2^x has a relative error of two roundings; the exponent,
// the sum, the quotient and the products have about one each, and |z| p (1 - p) < 1/4 for the error of the exponent z.
inline double gate_error(double x) { return 8 * ROUNDOFF * std::abs(x) + 1e-37; }

void check_activations(Checks& checks);
void check_linear_layers(Checks& checks);
void check_attention(Checks& checks);

// Compares the emulation of AMX's tiles with those of the processor, if it has them. Returns the number of failures.
size_t check_tile_emulation();

}  // namespace fusion_edge::checks
