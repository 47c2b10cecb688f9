// headrace.CausalConv and headrace.Recurrence.
#pragma once

#include "../recurrent/recurrent.h"
#include "operator.h"

namespace headrace {
namespace ort {

// The rows of a call, from inputs `first` to `first + 2`, and the memory of a state.
inline RecurrentRows recurrent_rows(const Context& run, size_t first, const Tensor& state, int64_t num_tokens) {
  const Tensor slot = run.input(first), past_len = run.input(first + 1), query_len = run.input(first + 2);
  RecurrentRows rows;
  rows.slot = slot.data<int32_t>();
  rows.past_len = past_len.data<int32_t>();
  rows.query_len = query_len.data<int32_t>();
  rows.num_slots = state.shape[0];
  rows.num_rows = static_cast<int32_t>(slot.shape.num_elements());
  if (past_len.shape.num_elements() != rows.num_rows || query_len.shape.num_elements() != rows.num_rows) {
    throw Failure("slot, past_len and query_len differ in length");
  }
  if (const char* fault = find_fault(rows)) throw Failure(fault);
  int64_t total = 0;
  for (int32_t row = 0; row < rows.num_rows; ++row) total += rows.query_len[row];
  if (total != num_tokens) throw Failure("the input has another number of tokens than query_len says");
  return rows;
}

inline float* state_in_place(Context& run, size_t index, const Tensor& past) {
  float* present = run.output<float>(index, past.shape);
  if (present != past.bytes && past.shape.num_elements() > 0) throw Failure("past and present must be the same memory");
  return present;
}

// Packed x [N, size], states [slots, width - 1, size], slot, past_len and query_len int32 [rows], weight [width, size],
// bias [size] -> conv(x), [N, size], and the states, bound to the memory of the past ones. Gated, x is b, c and x stacked,
// [N, 3 * size], and the result c * conv(b * x).
class CausalConvOp {
 public:
  static constexpr const char* NAME = "CausalConv";
  static constexpr Port INPUTS[] = {{FLOAT}, {FLOAT}, {INT32}, {INT32}, {INT32}, {FLOAT}, {FLOAT, OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{FLOAT}, {FLOAT}};

  explicit CausalConvOp(const Info& info)
      : kernels_(convolution_kernels()), weight_(info, 5), bias_(info, 6), is_gated_(info.integer("gated", 0) != 0) {}

  void compute(Context& run) {
    const Tensor x = run.input(0), past = run.input(1), weight = weight_.of(run), bias = bias_.of(run);
    if (weight.shape.count != 2 || weight.shape[0] < 1 || weight.shape[0] > MAX_CONVOLUTION) {
      throw Failure("the weight is [width, size], at most 16 wide");
    }
    Convolution job;
    job.size = weight.shape[1];
    job.width = static_cast<int32_t>(weight.shape[0]);
    job.is_gated = is_gated_;
    if (x.shape.count != 2 || x.shape.last() != (is_gated_ ? 3 : 1) * job.size) {
      throw Failure("the input does not have the channels of the weight");
    }
    if (past.shape.count != 3 || past.shape[1] != job.width - 1 || past.shape[2] != job.size) {
      throw Failure("the states are not [slots, width - 1, size]");
    }
    if (bias && bias.shape.num_elements() != job.size) throw Failure("the bias is not [size]");
    job.x = x.data<float>();
    job.weight = weight.data<float>();
    job.bias = bias.data<float>();
    job.rows = recurrent_rows(run, 2, past, x.shape[0]);
    job.out = run.output<float>(0, x.shape.with_last(job.size));
    job.state = state_in_place(run, 1, past);
    kernels_.convolve(job, run.parallel());
  }

 private:
  const ConvolutionKernels& kernels_;
  Weight weight_, bias_;
  bool is_gated_;
};

// Packed q, k and v [N, 2 * k_heads * k_dim + v_heads * v_dim], gates [N, v_heads], states [slots, v_heads, v_dim, k_dim],
// slot, past_len and query_len int32 [rows] -> S q, [N, v_heads * v_dim], and the states, bound to the memory of the past
// ones. With a_log and dt_bias [v_heads] a gated delta rule, whose gates are b and a, [N, 2 * v_heads].
class RecurrenceOp {
 public:
  static constexpr const char* NAME = "Recurrence";
  static constexpr Port INPUTS[] = {{FLOAT}, {FLOAT}, {FLOAT}, {INT32}, {INT32}, {INT32}, {FLOAT, OPTIONAL},
                                    {FLOAT, OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{FLOAT}, {FLOAT}};

  explicit RecurrenceOp(const Info& info)
      : kernels_(recurrence_kernels()), a_log_(info, 6), dt_bias_(info, 7), num_k_heads_(info.integer("k_heads")) {}

  void compute(Context& run) {
    const Tensor qkv = run.input(0), gates = run.input(1), past = run.input(2);
    const Tensor a_log = a_log_.of(run), dt_bias = dt_bias_.of(run);
    if (past.shape.count != 4) throw Failure("the states are not [slots, v_heads, v_dim, k_dim]");
    const int64_t v_heads = past.shape[1], v_dim = past.shape[2], k_dim = past.shape[3];
    if (num_k_heads_ < 1 || v_heads % num_k_heads_ != 0) throw Failure("v_heads is no multiple of k_heads");
    if (k_dim < 1 || k_dim > MAX_KEY) throw Failure("a key has at most 512 channels");
    if (qkv.shape.count != 2 || qkv.shape.last() != 2 * num_k_heads_ * k_dim + v_heads * v_dim) {
      throw Failure("qkv does not have the heads of the attribute and of the states");
    }
    if (static_cast<bool>(a_log) != static_cast<bool>(dt_bias)) throw Failure("a_log and dt_bias belong together");
    if (a_log && (a_log.shape.num_elements() != v_heads || dt_bias.shape.num_elements() != v_heads)) {
      throw Failure("a_log and dt_bias do not have the heads of the states");
    }
    if (gates.shape.count != 2 || gates.shape[0] != qkv.shape[0] || gates.shape.last() != (a_log ? 2 : 1) * v_heads) {
      throw Failure("the gates do not have the heads of the states");
    }
    Recurrence job;
    job.num_k_heads = static_cast<int32_t>(num_k_heads_);
    job.num_v_heads = static_cast<int32_t>(v_heads);
    job.k_dim = static_cast<int32_t>(k_dim);
    job.v_dim = static_cast<int32_t>(v_dim);
    job.qkv = qkv.data<float>();
    job.gates = gates.data<float>();
    job.a_log = a_log.data<float>();
    job.dt_bias = dt_bias.data<float>();
    job.rows = recurrent_rows(run, 3, past, qkv.shape[0]);
    job.out = run.output<float>(0, qkv.shape.with_last(v_heads * v_dim));
    job.state = state_in_place(run, 1, past);
    kernels_.run(job, run.parallel());
  }

 private:
  const RecurrenceKernels& kernels_;
  Weight a_log_, dt_bias_;
  int64_t num_k_heads_;
};

}  // namespace ort
}  // namespace headrace
