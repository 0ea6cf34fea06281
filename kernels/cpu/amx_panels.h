// Weights as AMX's left factor: int8 panels of 32 outputs, two tiles.

#pragma once

#include "amx_rows.h"

namespace fusion_edge {

constexpr size_t AMX_SIDES = 2;                     // tiles of a panel
constexpr size_t AMX_PANEL = AMX_SIDES * AMX_ROWS;  // outputs
// Bytes from a step of a panel to the next. With a line more, steps of a row fall into different sets of the caches.
constexpr size_t AMX_STEP = AMX_SIDES * AMX_TILE + 64;

// A thread's panels: what scales their sums, and their values, a part of the inputs at a time.
class AmxPanels {
  public:
    // For `panels` panels of outputs from `output` on. Keeps a reference to the weights.
    AmxPanels(const Weights& weights, size_t output, size_t panels);

    // Unpacks inputs from `start` to `end` of panels to tiles [panels, (end - start) / 64 steps, AMX_SIDES, 16, 64], in
    // memory that this thread keeps until the next call. Outputs after the last one are undefined.
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

}  // namespace fusion_edge
