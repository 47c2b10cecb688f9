#include "peak.h"

#include "../vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

constexpr int ROWS = WIDTH == 16 ? 12 : 6;  // with the two columns, as many sums as fit in the registers
constexpr int COLUMNS = 2;
constexpr int BLOCKS = 16;  // read in turn, so that no product can be kept from the round before

int64_t multiply_bytes(size_t num_rounds, int32_t* sink) {
  VecU8 left[BLOCKS * COLUMNS];
  VecI8 right[BLOCKS * ROWS];
  std::memset(left, 3, sizeof(left));
  std::memset(right, 1, sizeof(right));
  VecI sums[COLUMNS][ROWS] = {};
  for (size_t round = 0; round < num_rounds; ++round) {
    const VecU8* columns = left + round % BLOCKS * COLUMNS;
    const VecI8* rows = right + round % BLOCKS * ROWS;
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 2
      for (int column = 0; column < COLUMNS; ++column) {
        sums[column][row] = dot_bytes(sums[column][row], columns[column], rows[row]);
      }
    }
  }
  VecI total = {};
  for (const auto& column : sums) {
    for (const VecI& sum : column) total += sum;
  }
  *sink = total[0];
  return (int64_t)num_rounds * ROWS * COLUMNS * WIDTH * 4 * 2;
}

}  // namespace

extern const PeakKernels peak_kernels;
const PeakKernels peak_kernels = {multiply_bytes};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
