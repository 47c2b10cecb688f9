// Products of float rows with quantized weights: y[M, N] = x[M, K] times weights[N, K] transposed.
//
// The rows are quantized to int8 inside, the products are int8 times uint8 with int32 sums, and the sums are scaled to
// floats. Two kinds of weights:
//
//   blocks    8 or 4 bits, with a scale (and perhaps a zero point) for each block of inputs of an output. Each block of
//             a row of x gets a scale of its own. ONNX Runtime's MatMulNBits stores its weights so.
//   channels  8 bits with one scale for each output. All rows of x have one calibrated scale, or each group of inputs
//             of a row gets a scale of its own.
//
// Integer sums are exact. Float sums run over the blocks in order, with the same instructions for any number of rows:
// a row's result does not depend on other rows, nor on the number of threads.
//
// Weights are repacked once. Nothing here knows ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../parallel.h"
#include "../variant.h"

namespace headrace {

// Columns (outputs) that are stored side by side. Packed weights have whole pairs of panels.
constexpr int64_t PANEL = 16;

// How weights are quantized.
struct WeightShape {
  int64_t num_outputs;  // N
  int64_t num_inputs;   // K
  int64_t block_size;   // inputs that share a scale of x, a multiple of 8; num_inputs for one scale a row
  int32_t bits;         // 8 or 4
  int32_t has_zero_points;   // a zero point for each block; otherwise the middle, 2^(bits - 1), stands for 0
  int32_t has_block_scales;  // a scale of weights for each block; otherwise one for each output

  int64_t num_blocks() const { return (num_inputs + block_size - 1) / block_size; }
  // The last block is filled up with zeros; a block's bytes are whole steps of 4 inputs (8 if they have 4 bits).
  int64_t padded_block() const { return (block_size + 32 / bits - 1) / (32 / bits) * (32 / bits); }
  int64_t num_panels() const { return (num_outputs + 2 * PANEL - 1) / (2 * PANEL) * 2; }
  int64_t num_scale_blocks() const { return has_block_scales ? num_blocks() : 1; }
  // Bytes of a panel: its integers, then its scales, then its zero points.
  int64_t integer_bytes() const { return num_blocks() * padded_block() * PANEL * bits / 8; }
  int64_t scale_bytes() const { return num_scale_blocks() * PANEL * 4; }
  int64_t panel_bytes() const {
    const int64_t bytes = integer_bytes() + scale_bytes() + (has_zero_points ? num_blocks() * PANEL : 0);
    return (bytes + 63) / 64 * 64;
  }
  int64_t packed_bytes() const { return num_panels() * panel_bytes(); }
};

struct LinearKernels {
  // Blocks. values: block_size * bits / 8 bytes for each block of each output, pairs of 4 bits low half first.
  // scales: [N, num_scale_blocks]. zero_points: [N, ceil(num_blocks * bits / 8)], pairs low half first; or null.
  // packed: packed_bytes() bytes, at a multiple of 64.
  void (*pack_blocks)(const WeightShape&, const uint8_t* values, const float* scales, const uint8_t* zero_points,
                      uint8_t* packed, const Parallel&);
  // 8-bit channels. values: [K, N] around 0. scales: [N].
  void (*pack_channels)(const WeightShape&, const int8_t* values, const float* scales, uint8_t* packed,
                        const Parallel&);
  // x: [num_rows, K]; y: [num_rows, N]. x_scale: calibrated, for all of x; 0: each block of each row is scaled by its
  // largest value. The calling thread keeps the memory for quantized rows until it ends.
  void (*multiply)(const WeightShape&, const uint8_t* packed, const float* x, int64_t num_rows, float x_scale, float* y,
                   const Parallel&);
};

HEADRACE_TABLE(LinearKernels, linear_kernels)

}  // namespace headrace
