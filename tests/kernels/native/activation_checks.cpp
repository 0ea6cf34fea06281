#include <cmath>

#include "checks.h"

namespace fusion_edge::checks {

void check_activations(Checks& checks) {
    for (const size_t count : {1, 15, 16, 17, 100, 40000}) {
        Random random(count);
        std::vector<float> gate(count), up = random.normals(count), result(count);
        for (float& x : gate) x = random.normal() * std::exp(random.uniform(-9, 4));
        const std::string size = " of " + std::to_string(count) + " values";
        for (const float slope : {1.0f, 1.702f}) {
            Expected expected;
            for (const float x : gate) expected.add(swish(x, slope), gate_error(x));
            checks.run("swish" + size, result, [&](const Parallel& parallel) {
                checks.kernels.swish(gate.data(), count, slope, result.data(), parallel);
            });
            checks.expect_near("swish" + size, result.data(), expected);
        }
        Expected swiglu, of_gelu;
        for (size_t i = 0; i < count; ++i) {
            swiglu.add(swish(gate[i], 1) * up[i], gate_error(gate[i]) * std::abs(up[i]) * 1.25 + 1e-37);
            of_gelu.add(gelu(gate[i]), gate_error(gate[i]));
        }
        checks.run("swiglu" + size, result, [&](const Parallel& parallel) {
            checks.kernels.swiglu(gate.data(), up.data(), count, result.data(), parallel);
        });
        checks.expect_near("swiglu" + size, result.data(), swiglu);
        checks.run("gelu" + size, result, [&](const Parallel& parallel) {
            checks.kernels.gelu(gate.data(), count, result.data(), parallel);
        });
        checks.expect_near("gelu" + size, result.data(), of_gelu);
    }
    float inputs[] = {NAN, 0, -INFINITY, 1e30f, -1e30f}, results[5];
    checks.kernels.swish(inputs, 5, 1, results, run_serially);
    checks.expect(std::isnan(results[0]), "swish keeps NaN");
    checks.expect(results[1] == 0 && results[3] == 1e30f && results[4] == 0, "swish of 0 and large values");
}

}  // namespace fusion_edge::checks
