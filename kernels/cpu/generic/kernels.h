// The kernels of a tier, from the generic ones and its micro-kernels.

#pragma once

#include "../kernels.h"
#include "activations.h"
#include "attention.h"
#include "gemv.h"

namespace fusion_edge::SIMD {

// `Gemm::gemm` and `Gemm::mlp` are GEMMs of more than FEW_ROWS rows. `Flash::kernel<T>(precision)` returns a
// FlashKernel.
template <class Gemm, class Flash>
class TierKernels final : public Kernels {
  public:
    explicit TierKernels(const char* tier) : tier_(tier) {}

    const char* tier() const override { return tier_; }
    void gemm(
        const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
        const Parallel& parallel) const override {
        SIMD::gemm<Gemm>(x, rows, weights, activation, result, parallel);
    }
    void mlp(
        const float* x, size_t rows, const Weights& up, const Weights& down, float* result,
        const Parallel& parallel) const override {
        SIMD::mlp<Gemm>(x, rows, up, down, result, parallel);
    }
    void attend(const MultiHeadParams& params, Precision precision, const Parallel& parallel) const override {
        SIMD::attend<Flash>(params, precision, parallel);
    }
    void attend(const CausalParams<float>& params, Precision precision, const Parallel& parallel) const override {
        SIMD::attend<Flash>(params, precision, parallel);
    }
    void attend(const CausalParams<int8_t>& params, Precision precision, const Parallel& parallel) const override {
        SIMD::attend<Flash>(params, precision, parallel);
    }
    void fill_with_mean(const MultiHeadParams& params, const Parallel& parallel) const override {
        SIMD::fill_with_mean(params, parallel);
    }
    void prefill_int8_cache(
        const CausalParams<int8_t>& params, const CacheQuantization& quantization, Precision precision,
        const Parallel& parallel) const override {
        SIMD::prefill_int8_cache<Flash>(params, quantization, precision, parallel);
    }
    void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel) const override {
        SIMD::swish(x, count, slope, result, parallel);
    }
    void swiglu(
        const float* gate, const float* up, size_t count, float* result, const Parallel& parallel) const override {
        SIMD::swiglu(gate, up, count, result, parallel);
    }
    void gelu(const float* x, size_t count, float* result, const Parallel& parallel) const override {
        SIMD::gelu(x, count, result, parallel);
    }

  private:
    const char* tier_;
};

}  // namespace fusion_edge::SIMD
