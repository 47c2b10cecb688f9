// Sum and norm of rows, and the gate of an MLP. A row's sums are made in one order, whoever runs it.
#include "norm.h"

#include "../vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

// Floats of one task: some 4 microseconds, many times what handing out a task costs.
constexpr size_t TASK_FLOATS = 16384;

HEADRACE_INLINE size_t rows_of_task(size_t size) { return size >= TASK_FLOATS ? 1 : TASK_FLOATS / size; }

float root(float value) {
  float result;
#if defined(__x86_64__)
  result = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(value)));
#else
  result = __builtin_sqrtf(value);
#endif
  return result;
}

void norm_row(const AddNorm& job, size_t row) {
  const float* x = job.x + row * job.size;
  const float* skip = job.skip == nullptr ? nullptr : job.skip + row * job.size;
  float* normed = job.normed + row * job.size;
  // The sum goes to where it is wanted, or to the place of the result, which is written last.
  float* total = job.sum == nullptr ? normed : job.sum + row * job.size;
  Vec squares{}, values{};
  each_vector(job.size, [&](size_t at, size_t count) {
    Vec value = load_some(x + at, count);
    if (skip != nullptr) value = value + load_some(skip + at, count);
    store_some(total + at, value, count);
    if (job.is_layer_norm) {
      values = values + value;
    } else {
      squares = fma(value, value, squares);
    }
  });
  float mean = 0.0f;
  if (job.is_layer_norm) {
    mean = sum(values) / (float)job.size;
    each_vector(job.size, [&](size_t at, size_t count) {
      Vec value = load_some(total + at, count) - splat(mean);
      if (count < WIDTH) {  // the zeros behind the row are no values
        Vec kept{};
        for (size_t i = 0; i < count; ++i) kept[i] = value[i];
        value = kept;
      }
      squares = fma(value, value, squares);
    });
  }
  const Vec factor = splat(1.0f / root(sum(squares) / (float)job.size + job.epsilon));
  each_vector(job.size, [&](size_t at, size_t count) {
    Vec value = (load_some(total + at, count) - splat(mean)) * factor * load_some(job.weight + at, count);
    if (job.bias != nullptr) value = value + load_some(job.bias + at, count);
    store_some(normed + at, value, count);
  });
}

void add_norm(const AddNorm& job, const Parallel& parallel) {
  const size_t rows = rows_of_task(job.size);
  parallel.each((job.num_rows + rows - 1) / rows, [&](size_t task) {
    const size_t end = (task + 1) * rows < job.num_rows ? (task + 1) * rows : job.num_rows;
    for (size_t row = task * rows; row < end; ++row) norm_row(job, row);
  });
}

HEADRACE_INLINE Vec gated(const GateUp& job, Vec gate, Vec up) {
  if (job.activation == Gate::silu) return silu(gate) * up;
  if (job.activation == Gate::gelu_tanh) return gelu_tanh(gate) * up;
  const Vec low = min(splat(job.limit), gate), inside = max(splat(-job.limit), min(splat(job.limit), up));
  return low / (splat(1.0f) + exp(splat(-job.alpha) * low)) * (inside + splat(1.0f));
}

void gate_up(const GateUp& job, const Parallel& parallel) {
  const size_t rows = rows_of_task(2 * job.size);
  parallel.each((job.num_rows + rows - 1) / rows, [&](size_t task) {
    const size_t end = (task + 1) * rows < job.num_rows ? (task + 1) * rows : job.num_rows;
    for (size_t row = task * rows; row < end; ++row) {
      const float* gate = job.stacked + row * 2 * job.size;
      each_vector(job.size, [&](size_t at, size_t count) {
        const Vec x = load_some(gate + at, count);
        const Vec up = load_some(gate + job.size + at, count);
        store_some(job.gated + row * job.size + at, gated(job, x, up), count);
      });
    }
  });
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {add_norm, gate_up};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
