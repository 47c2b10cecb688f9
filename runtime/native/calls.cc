// Entry points for callers without a session: tests and benchmarks call the chosen variant's kernels through ctypes.
#include "attention/attention.h"
#include "linear/linear.h"
#include "linear/peak.h"
#include "norm/norm.h"
#include "recurrent/recurrent.h"
#include "sampling/draw.h"

using namespace headrace;

HEADRACE_EXPORT void headrace_add_norm(const AddNorm* job, int num_threads) {
  const Threads threads{num_threads};
  norm_kernels().add_norm(*job, threads.parallel());
}

HEADRACE_EXPORT void headrace_gate_up(const GateUp* job, int num_threads) {
  const Threads threads{num_threads};
  norm_kernels().gate_up(*job, threads.parallel());
}

HEADRACE_EXPORT int64_t headrace_packed_bytes(const WeightShape* shape) { return shape->packed_bytes(); }

HEADRACE_EXPORT void headrace_pack_blocks(const WeightShape* shape, const uint8_t* values, const float* scales,
                                          const uint8_t* zero_points, uint8_t* packed) {
  linear_kernels().pack_blocks(*shape, values, scales, zero_points, packed, sequential());
}

HEADRACE_EXPORT void headrace_pack_channels(const WeightShape* shape, const int8_t* values, const float* scales,
                                            uint8_t* packed) {
  linear_kernels().pack_channels(*shape, values, scales, packed, sequential());
}

HEADRACE_EXPORT void headrace_multiply(const WeightShape* shape, const uint8_t* packed, const float* x,
                                       int64_t num_rows, float x_scale, float* y, int num_threads) {
  const Threads threads{num_threads};
  linear_kernels().multiply(*shape, packed, x, num_rows, x_scale, y, threads.parallel());
}

HEADRACE_EXPORT int64_t headrace_multiply_bytes(size_t num_rounds, int32_t* sink) {
  return peak_kernels().multiply_bytes(num_rounds, sink);
}

// Null, or what is wrong with the call.
HEADRACE_EXPORT const char* headrace_convolve(const Convolution* job, int num_threads) {
  const Threads threads{num_threads};
  if (const char* fault = find_fault(job->rows)) return fault;
  convolution_kernels().convolve(*job, threads.parallel());
  return nullptr;
}

// Null, or what is wrong with the call.
HEADRACE_EXPORT const char* headrace_recurrence(const Recurrence* job, int num_threads) {
  const Threads threads{num_threads};
  if (const char* fault = find_fault(job->rows)) return fault;
  recurrence_kernels().run(*job, threads.parallel());
  return nullptr;
}

// Null, or what is wrong with the call.
HEADRACE_EXPORT const char* headrace_attend(const AttentionCall* call, int num_threads) {
  const Threads threads{num_threads};
  if (const char* fault = find_fault(*call)) return fault;
  return attention_kernels().attend(*call, threads.parallel()) ? nullptr : "no memory";
}

// A token, or one of the negative numbers of sampling/draw.h.
HEADRACE_EXPORT int64_t headrace_draw(const Draw* job) { return draw_kernels().draw(*job); }
