// A causal convolution of each channel over the tokens of packed rows. A task has some channels of one row: it walks
// the tokens with the last inputs in registers.
#include "../vec.h"
#include "recurrent.h"

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

// Channels of one task; a multiple of every WIDTH.
constexpr int64_t TASK_CHANNELS = 256;

// WIDTH channels, or `count` of them, from `at` on, of one row whose first token is `first`.
void convolve_channels(const Convolution& job, int32_t row, int64_t first, int64_t at, size_t count) {
  const int64_t size = job.size, stride = job.is_gated ? 3 * size : size;
  const int32_t width = job.width, past = width - 1;
  float* state = job.state + (int64_t)job.rows.slot[row] * past * size + at;
  Vec inputs[MAX_CONVOLUTION], weight[MAX_CONVOLUTION];
  for (int32_t j = 0; j < width; ++j) weight[j] = load_some(job.weight + j * size + at, count);
  for (int32_t j = 0; j < past; ++j) {
    inputs[j] = job.rows.past_len[row] > 0 ? load_some(state + j * size, count) : Vec{};
  }
  const Vec bias = job.bias == nullptr ? Vec{} : load_some(job.bias + at, count);
  const int64_t last = first + job.rows.query_len[row];
  for (int64_t token = first; token < last; ++token) {
    const float* x = job.x + token * stride + at;
    inputs[past] = job.is_gated ? load_some(x, count) * load_some(x + 2 * size, count) : load_some(x, count);
    Vec sum = weight[0] * inputs[0];
    for (int32_t j = 1; j < width; ++j) sum = fma(weight[j], inputs[j], sum);
    sum = sum + bias;
    if (job.is_gated) sum = sum * load_some(x + size, count);
    store_some(job.out + token * size + at, sum, count);
    for (int32_t j = 0; j < past; ++j) inputs[j] = inputs[j + 1];
  }
  for (int32_t j = 0; j < past; ++j) store_some(state + j * size, inputs[j], count);
}

void convolve(const Convolution& job, const Parallel& parallel) {
  const int64_t blocks = (job.size + TASK_CHANNELS - 1) / TASK_CHANNELS;
  parallel.each((size_t)(blocks * job.rows.num_rows), [&](size_t task) {
    const int32_t row = (int32_t)((int64_t)task / blocks);
    if (job.rows.query_len[row] == 0) return;
    int64_t first = 0;
    for (int32_t before = 0; before < row; ++before) first += job.rows.query_len[before];
    const int64_t begin = (int64_t)task % blocks * TASK_CHANNELS;
    const int64_t end = begin + TASK_CHANNELS < job.size ? begin + TASK_CHANNELS : job.size;
    each_vector((size_t)(end - begin), [&](size_t at, size_t count) {
      convolve_channels(job, row, first, begin + (int64_t)at, count);
    });
  });
}

}  // namespace

extern const ConvolutionKernels convolution_kernels;
const ConvolutionKernels convolution_kernels = {convolve};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
