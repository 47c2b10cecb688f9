// The most int8 arithmetic that a variant's instructions do: what `headrace bench` compares int8 products with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../variant.h"

namespace headrace {

struct PeakKernels {
  // Multiplies and adds bytes in registers and the first-level cache, `num_rounds` times a fixed block. Returns the
  // operations done, two a product; `sink` takes a value that depends on all of them.
  int64_t (*multiply_bytes)(size_t num_rounds, int32_t* sink);
};

HEADRACE_TABLE(PeakKernels, peak_kernels)

}  // namespace headrace
