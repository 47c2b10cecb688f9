// Kernels of the small operators: sum and norm of rows, and the gate of an MLP.
#pragma once

#include <cstddef>

#include "../parallel.h"
#include "../variant.h"

namespace headrace {

enum class Gate { silu, gelu_tanh, clamped };

// One norm over the last axis of `num_rows` rows of `size` floats.
struct AddNorm {
  const float* x;
  const float* skip;    // added to x first; null: nothing is
  const float* weight;  // [size]
  const float* bias;    // [size]; null: none
  float* normed;
  float* sum;  // x + skip; null: not wanted
  size_t num_rows;
  size_t size;
  float epsilon;
  bool is_layer_norm;  // subtracts the mean; otherwise the root mean square
};

// gated[r, i] = activation(stacked[r, i]) * stacked[r, size + i]; clamped, with gate = min(stacked[r, i], limit):
//               gate * sigmoid(alpha * gate) * (clip(stacked[r, size + i], -limit, limit) + 1)
struct GateUp {
  const float* stacked;  // [num_rows, 2 * size]: gate, then up
  float* gated;          // [num_rows, size]
  size_t num_rows;
  size_t size;
  Gate activation;
  float limit, alpha;    // of clamped
};

struct NormKernels {
  void (*add_norm)(const AddNorm&, const Parallel&);
  void (*gate_up)(const GateUp&, const Parallel&);
};

HEADRACE_TABLE(NormKernels, norm_kernels)

}  // namespace headrace
