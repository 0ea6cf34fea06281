#include "checks.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <thread>

namespace fusion_edge::checks {

void run_serially(size_t count, const std::function<void(size_t)>& body) {
    for (size_t i = 0; i < count; ++i) body(i);
}

void run_on_threads(size_t count, const std::function<void(size_t)>& body) {
    std::atomic<size_t> next = 0;
    const auto work = [&] {
        for (size_t i; (i = next++) < count;) body(i);
    };
    std::thread one(work), other(work);
    one.join();
    other.join();
}

void Checks::expect(bool condition, const std::string& what) {
    ++count_;
    if (condition) return;
    ++failures_;
    std::printf("FAILED %s: %s\n", kernels.tier(), what.c_str());
}

void Checks::expect_near(const std::string& what, const float* actual, const Expected& expected) {
    size_t worst = 0;
    double largest = -1;  // error in units of the tolerance
    for (size_t i = 0; i < expected.values.size(); ++i) {
        const bool same_nan = std::isnan(actual[i]) && std::isnan(expected.values[i]);
        const double error = same_nan ? 0 : std::abs(actual[i] - expected.values[i]) / expected.tolerances[i];
        if (error <= largest) continue;  // false for NaN
        worst = i;
        largest = std::isnan(error) ? INFINITY : error;
    }
    char numbers[200];
    std::snprintf(
        numbers, sizeof numbers, ": value %zu is %.9g; expected %.9g +- %.3g", worst, actual[worst],
        expected.values[worst], expected.tolerances[worst]);
    expect(largest <= 1, what + numbers);
}

double swish(double x, double slope) { return x / (1 + std::exp(-slope * x)); }

double gelu(double x) { return swish(x, 2 * std::sqrt(2 / M_PI) * (1 + 0.044715 * x * x)); }

}  // namespace fusion_edge::checks
