// The kernels. Each tier of instructions (tiers/) has its own.

#pragma once

#include "attention.h"
#include "gemm.h"
#include "parallel.h"

namespace fusion_edge {

class Kernels {
  public:
    virtual const char* tier() const = 0;

    // result [rows, outputs] = activation(x [rows, inputs]) W^T + bias. There is at least one row.
    virtual void gemm(
        const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
        const Parallel& parallel) const = 0;

    // result [rows, down.outputs] = down(GELU(up(x))), both with static quantization. With more than a few rows, the
    // hidden activations are stored as 8-bit integers only.
    virtual void mlp(
        const float* x, size_t rows, const Weights& up, const Weights& down, float* result,
        const Parallel& parallel) const = 0;

    virtual void attend(const MultiHeadParams& params, Precision precision, const Parallel& parallel) const = 0;
    virtual void attend(const CausalParams<float>& params, Precision precision, const Parallel& parallel) const = 0;
    virtual void attend(const CausalParams<int8_t>& params, Precision precision, const Parallel& parallel) const = 0;

    // Sets the result's rows after the first `queries` to the mean of the values of their batch.
    virtual void fill_with_mean(const MultiHeadParams& params, const Parallel& parallel) const = 0;

    // Prefill from position 0 with an int8 cache: attends to float32 keys and values, then quantizes them into the
    // cache. The cache after them keeps the content of the past.
    virtual void prefill_int8_cache(
        const CausalParams<int8_t>& params, const CacheQuantization& quantization, Precision precision,
        const Parallel& parallel) const = 0;

    // result [count] = x / (1 + e^(-slope x)). With slope 1 it is SiLU.
    virtual void swish(const float* x, size_t count, float slope, float* result, const Parallel& parallel) const = 0;

    // result [count] = SiLU(gate) * up (https://arxiv.org/abs/2002.05202).
    virtual void swiglu(
        const float* gate, const float* up, size_t count, float* result, const Parallel& parallel) const = 0;

    // result [count] = GELU(x) in its tanh form (https://arxiv.org/abs/1606.08415, section 2):
    // x (1 + tanh u) / 2 = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    virtual void gelu(const float* x, size_t count, float* result, const Parallel& parallel) const = 0;

  protected:
    ~Kernels() = default;
};

// Kernels in use: those of this processor's fastest tier, unless use_tier chose others. Null if there are none.
const Kernels* kernels();

// Names of the tiers of this processor, the fastest last, then null.
const char* const* tiers();

// Uses the kernels of a tier, and returns whether this processor has it.
bool use_tier(const char* name);

// Tells how many threads work is divided for. The default is the number of processors.
void use_threads(size_t count);

// Whether GEMV reads weights in several streams. The default is true on Intel processors only.
bool reads_streams();

// Sets it, and returns the previous setting.
bool use_streams(bool enabled);

}  // namespace fusion_edge
