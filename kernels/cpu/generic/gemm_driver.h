// Driver of GEMMs: divides the work, and multiplies tiles of rows with panels of outputs by a tier's micro-kernel.
//
// A micro-kernel is a class with
//   ROWS, OUTPUTS: size of a tile of the result
//   Inputs: packed activations
//   pack_rows(x, rows, weights, activation, parallel) -> Inputs, in memory that the calling thread keeps
//   cached_panels(inputs): panels of OUTPUTS outputs that the caches hold; min_tasks(): parts for all threads
//   a constructor from (inputs, rows, weights, output, panels), for a thread's panels from an output on
//   bias(panel): bias [OUTPUTS] of one of them
//   ResultWriter(result, rows, outputs): a TileWriter of its sums as float32
//   BLOCK_ROWS: rows that it multiplies with all panels at a time
//   multiply(row, rows, output): multiplies a block of rows with the panels, and passes float32 sums of each tile to
//     output.write, without bias and aligned to 64 bytes: [ROWS, OUTPUTS], or as its writers expect

#pragma once

#include <algorithm>

#include "functions.h"

namespace fusion_edge::SIMD {

constexpr size_t MAX_PANELS = 8;  // panels that a thread multiplies with each tile of rows

// Output of the tiles' sums.
class TileWriter {
  public:
    virtual ~TileWriter() = default;
    // Writes sums [rows, OUTPUTS] of rows from `row` on and outputs from `output` on; bias [OUTPUTS].
    virtual void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const = 0;
    // Prefetches the memory of the next write; a micro-kernel may call it.
    virtual void prefetch(size_t, size_t, size_t) const {}
};

// Writes float32 [rows, outputs]. Streams past the caches if the result exceeds them.
template <size_t OUTPUTS>
class FloatWriter final : public TileWriter {
  public:
    FloatWriter(float* result, size_t rows, size_t outputs) : result_(result), outputs_(outputs) {
        constexpr size_t CACHED = 16 << 20;  // bytes
        streams_ = rows * outputs * sizeof(float) > CACHED && outputs % LANES == 0 &&
                   reinterpret_cast<uintptr_t>(result) % 64 == 0;
    }

    void write(const float* sums, const float* bias, size_t row, size_t rows, size_t output) const override {
        const size_t count = std::min(OUTPUTS, outputs_ - output);
        for (size_t i = 0; i < rows; ++i)
            for (size_t j = 0; j < count; j += LANES) {
                const Floats sum = add(load(sums + i * OUTPUTS + j), load(bias + j));
                float* to = result_ + (row + i) * outputs_ + output + j;
                if (streams_) stream(to, sum);
                else store(to, sum, count - j);
            }
    }

    void prefetch(size_t row, size_t rows, size_t output) const override {
        for (size_t i = 0; i < rows && !streams_; ++i)
            for (size_t j = 0; j < OUTPUTS; j += LANES)
                __builtin_prefetch(result_ + (row + i) * outputs_ + output + j, 1);
    }

  private:
    float* result_;
    size_t outputs_;
    bool streams_;
};

// Output of a thread's panels, by their number.
template <class Kernel>
struct PanelOutput {
    const TileWriter& writer;
    const Kernel& kernel;
    size_t start;  // first output

    void write(const float* sums, size_t panel, size_t row, size_t rows) const {
        writer.write(sums, kernel.bias(panel), row, rows, start + panel * Kernel::OUTPUTS);
    }
    void prefetch(size_t panel, size_t row, size_t rows) const {
        writer.prefetch(row, rows, start + panel * Kernel::OUTPUTS);
    }
};

// Multiplies all rows with the panels of outputs from `start` to `end`.
template <class Kernel>
void multiply_panels(
    const typename Kernel::Inputs& x, size_t rows, const Weights& weights, size_t start, size_t end,
    const TileWriter& writer) {
    Kernel kernel(x, rows, weights, start, (end - start + Kernel::OUTPUTS - 1) / Kernel::OUTPUTS);
    const PanelOutput<Kernel> output{writer, kernel, start};
    const size_t blocks = (rows + Kernel::BLOCK_ROWS - 1) / Kernel::BLOCK_ROWS;
    const size_t block_rows = round_up((rows + blocks - 1) / blocks, Kernel::ROWS);
    for (size_t row = 0; row < rows; row += block_rows)
        kernel.multiply(row, std::min(block_rows, rows - row), output);
    finish_streams();
}

template <class Kernel>
void multiply(
    const typename Kernel::Inputs& x, size_t rows, const Weights& weights, const TileWriter& writer,
    const Parallel& parallel) {
    // As many panels per task as fit the L2 cache, to read the rows less often, but enough tasks for all processors.
    const size_t panels = (weights.outputs + Kernel::OUTPUTS - 1) / Kernel::OUTPUTS;
    const size_t fitting = std::min(Kernel::cached_panels(x), panels / Kernel::min_tasks());
    const size_t per_task = std::clamp<size_t>(fitting, 1, MAX_PANELS) * Kernel::OUTPUTS;
    parallel((weights.outputs + per_task - 1) / per_task, [&](size_t task) {
        const size_t start = task * per_task, end = std::min(weights.outputs, start + per_task);
        multiply_panels<Kernel>(x, rows, weights, start, end, writer);
    });
}

// result = activation(x) W^T + bias.
template <class Kernel>
void gemm_rows(
    const float* x, size_t rows, const Weights& weights, Activation activation, float* result,
    const Parallel& parallel) {
    const typename Kernel::Inputs inputs = Kernel::pack_rows(x, rows, weights, activation, parallel);
    const typename Kernel::ResultWriter writer(result, rows, weights.outputs);
    multiply<Kernel>(inputs, rows, weights, writer, parallel);
}

// result = down(GELU(up(x))). Kernel::HiddenWriter(rows, up, quantization) writes GELU of the sums, quantized, to its
// `hidden`: the inputs of `down`, in memory that the calling thread keeps.
template <class Kernel>
void mlp_rows(
    const float* x, size_t rows, const Weights& up, const Weights& down, float* result, const Parallel& parallel) {
    const typename Kernel::Inputs inputs = Kernel::pack_rows(x, rows, up, Activation::NONE, parallel);
    const typename Kernel::HiddenWriter writer(rows, up, *down.static_quantization);
    multiply<Kernel>(inputs, rows, up, writer, parallel);
    multiply<Kernel>(writer.hidden, rows, down, typename Kernel::ResultWriter(result, rows, down.outputs), parallel);
}

}  // namespace fusion_edge::SIMD
