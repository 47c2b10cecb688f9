// Drawing a token from a row of logits: weights exp(logit / temperature) of a whole vocabulary, without storing them.
#pragma once

#include <cstdint>

#include "../variant.h"

namespace headrace {

struct Draw {
  const float* logits;
  int64_t num_logits;
  float inverse_temperature;
  float top_p;     // 1 for all
  float min_p;     // 0 for all
  int32_t unused;
  double uniform;  // 0 to 1: where in the running sum of all weights, in the order of ids, the token lies
};

// Instead of a token.
constexpr int64_t DROPPED = -1;     // top-p or min-p leave the token out
constexpr int64_t NOT_FINITE = -2;  // there is a NaN, or the highest logit is infinite
constexpr int64_t NO_MEMORY = -3;

struct DrawKernels {
  int64_t (*draw)(const Draw&);
};

HEADRACE_TABLE(DrawKernels, draw_kernels)

}  // namespace headrace
