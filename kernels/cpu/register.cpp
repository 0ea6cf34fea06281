// Entry points of the library: registration with ONNX Runtime, and switches.

#include <mutex>
#include <vector>

#include "custom_op.h"
#include "kernels.h"
#include "operators.h"

namespace fusion_edge {
namespace {

CustomOpDomain* create_domain(const char* name, const Operators& operators) {
    CustomOpDomain* domain = nullptr;
    check(api->create_custom_op_domain(name, &domain));
    for (const CustomOp* op : operators) check(api->custom_op_domain_add(domain, op));
    return domain;
}

Operators concatenate(std::initializer_list<Operators> parts) {
    Operators all;
    for (const Operators& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
}

}  // namespace
}  // namespace fusion_edge

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Returns the names of the tiers of this processor, the fastest last, then null. Without any it cannot run the kernels.
EXPORTED const char* const* tiers() { return fusion_edge::tiers(); }

// For tests and benchmarks: uses the tier of a name, and returns whether this processor has it.
EXPORTED bool use_tier(const char* name) { return fusion_edge::use_tier(name); }

// Tells how many threads the sessions have (kernels.h).
EXPORTED void use_threads(size_t count) { fusion_edge::use_threads(count); }

// For tests: attention in float32 (operators.h).
EXPORTED void use_bfloat16(bool enabled) { fusion_edge::use_bfloat16(enabled); }

// For tests: GEMV with or without streams on any processor (kernels.h).
EXPORTED bool use_streams(bool enabled) { return fusion_edge::use_streams(enabled); }

// ONNX Runtime calls this when a session registers the library.
EXPORTED onnxruntime::Status* RegisterCustomOps(
    onnxruntime::SessionOptions* options, const onnxruntime::ApiBase* base) {
    using namespace fusion_edge;
    static std::vector<CustomOpDomain*> domains;  // shared by all sessions
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!api) api = base->get_api(API_VERSION);
    if (!api) return base->get_api(1)->create_status(FAIL, "The kernels need ONNX Runtime 1.23 or newer.");
    return to_status("fusion-edge's kernels", [&] {
        expect(kernels(), "fusion-edge's kernels", "this processor has none of the instructions that they need.");
        if (domains.empty())
            domains = {
                // In place of ONNX Runtime's own operators. Recent bundles hold functions instead of some of them.
                create_domain(
                    "com.microsoft", concatenate({contributed_attention_operators(), contributed_linear_operators(),
                                                  contributed_activation_operators()})),
                // In place of functions that graphs define (kernels/onnx_functions/).
                create_domain(
                    "fusion_edge", concatenate({attention_operators(), linear_operators(), activation_operators()}))};
        for (CustomOpDomain* domain : domains) check(api->add_custom_op_domain(options, domain));
    });
}
