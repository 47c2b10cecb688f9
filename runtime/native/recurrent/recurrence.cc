// Linear recurrences over packed rows. Each row of a head's state is for one channel of v and knows nothing of the
// others, so a task has some of these rows of one head of one sequence, and walks the tokens with them in the cache.
#include <cmath>

#include "../vec.h"
#include "recurrent.h"

namespace headrace {
namespace HEADRACE_VARIANT {
namespace {

// Rows of a state in one task: 16 KiB at 128 channels of k.
constexpr int32_t TASK_ROWS = 32;

// x times factor over its length, [size].
void to_unit(const float* x, float factor, int32_t size, float* out) {
  Vec squares{};
  each_vector((size_t)size, [&](size_t at, size_t count) {
    const Vec value = load_some(x + at, count);
    squares = fma(value, value, squares);
  });
  const Vec scale = splat(factor / std::sqrt(sum(squares) + 1e-6f));
  each_vector((size_t)size, [&](size_t at, size_t count) {
    store_some(out + at, load_some(x + at, count) * scale, count);
  });
}

// How much of a state is left after a token, and how much of the token enters it: 0 without a delta rule.
struct Gates {
  float kept, beta;
};

Gates gates_of(const Recurrence& job, int64_t token, int32_t head) {
  if (job.a_log == nullptr) return Gates{std::exp(job.gates[token * job.num_v_heads + head]), 0.0f};
  const float* gates = job.gates + token * 2 * job.num_v_heads;
  const float a = gates[job.num_v_heads + head] + job.dt_bias[head];
  const float softplus = a > 20.0f ? a : std::log1p(std::exp(a));
  return Gates{std::exp(-std::exp(job.a_log[head]) * softplus), 1.0f / (1.0f + std::exp(-gates[head]))};
}

// What the delta rule adds along k to one row of S: beta * (v - kept * S k).
HEADRACE_INLINE float delta_of(const float* state, const float* k, float v, Gates gates, int32_t size) {
  const Vec kept = splat(gates.kept);
  Vec known{};
  each_vector((size_t)size, [&](size_t at, size_t count) {
    known = fma(load_some(state + at, count) * kept, load_some(k + at, count), known);
  });
  return gates.beta * (v - sum(known));
}

// One row of S, for one token: S = kept * S + added * k; returns S q.
HEADRACE_INLINE float step(float* state, const float* q, const float* k, float added, float share, int32_t size) {
  const Vec kept = splat(share), delta = splat(added);
  Vec out{};
  each_vector((size_t)size, [&](size_t at, size_t count) {
    const Vec value = fma(delta, load_some(k + at, count), load_some(state + at, count) * kept);
    store_some(state + at, value, count);
    out = fma(value, load_some(q + at, count), out);
  });
  return sum(out);
}

// Rows `begin` to `end` of one head's state, over the tokens of one row of the call.
void run_rows(const Recurrence& job, int32_t row, int32_t head, int32_t begin, int32_t end) {
  const int32_t k_dim = job.k_dim, k_size = job.num_k_heads * k_dim, v_size = job.num_v_heads * job.v_dim;
  const int32_t k_head = head / (job.num_v_heads / job.num_k_heads);
  float* state = job.state + (((int64_t)job.rows.slot[row] * job.num_v_heads + head) * job.v_dim) * k_dim;
  if (job.rows.past_len[row] == 0) {
    std::memset(state + (int64_t)begin * k_dim, 0, (size_t)(end - begin) * (size_t)k_dim * sizeof(float));
  }
  int64_t token = 0;
  for (int32_t before = 0; before < row; ++before) token += job.rows.query_len[before];
  float unit_q[MAX_KEY], unit_k[MAX_KEY];
  const bool is_delta = job.a_log != nullptr;
  const float scale = 1.0f / std::sqrt((float)k_dim);
  for (const int64_t last = token + job.rows.query_len[row]; token < last; ++token) {
    const float* qkv = job.qkv + token * (2 * k_size + v_size);
    const float *q = qkv + k_head * k_dim, *k = q + k_size;
    if (is_delta) {
      to_unit(q, scale, k_dim, unit_q);
      to_unit(k, 1.0f, k_dim, unit_k);
      q = unit_q;
      k = unit_k;
    }
    const Gates gates = gates_of(job, token, head);
    const float* v = qkv + 2 * k_size + head * job.v_dim;
    float* out = job.out + token * v_size + head * job.v_dim;
    for (int32_t i = begin; i < end; ++i) {
      float* part = state + (int64_t)i * k_dim;
      const float added = is_delta ? delta_of(part, k, v[i], gates, k_dim) : v[i];
      out[i] = step(part, q, k, added, gates.kept, k_dim);
    }
  }
}

void run(const Recurrence& job, const Parallel& parallel) {
  const int32_t blocks = (job.v_dim + TASK_ROWS - 1) / TASK_ROWS, a_row = blocks * job.num_v_heads;
  parallel.each((size_t)a_row * (size_t)job.rows.num_rows, [&](size_t task) {
    const int32_t row = (int32_t)(task / (size_t)a_row), rest = (int32_t)(task % (size_t)a_row);
    if (job.rows.query_len[row] == 0) return;
    const int32_t begin = rest % blocks * TASK_ROWS;
    run_rows(job, row, rest / blocks, begin, begin + TASK_ROWS < job.v_dim ? begin + TASK_ROWS : job.v_dim);
  });
}

}  // namespace

extern const RecurrenceKernels recurrence_kernels;
const RecurrenceKernels recurrence_kernels = {run};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
