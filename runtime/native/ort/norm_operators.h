// headrace.AddNorm and headrace.GateUp.
#pragma once

#include "../norm/norm.h"
#include "operator.h"

namespace headrace {
namespace ort {

// x and skip [..., size], weight and bias [size] -> norm of x + skip, and x + skip. Without skip: the norm of x.
class AddNormOp {
 public:
  static constexpr const char* NAME = "AddNorm";
  static constexpr Port INPUTS[] = {{FLOAT}, {FLOAT, OPTIONAL}, {FLOAT}, {FLOAT, OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{FLOAT}, {FLOAT, OPTIONAL}};

  explicit AddNormOp(const Info& info)
      : kernels_(norm_kernels()),
        weight_(info, 2),
        bias_(info, 3),
        epsilon_(info.number("epsilon")),
        is_layer_norm_(info.integer("is_layer_norm", 0) != 0) {}

  void compute(Context& run) {
    const Tensor x = run.input(0), skip = run.input(1), weight = weight_.of(run), bias = bias_.of(run);
    if (x.shape.count == 0 || weight.shape.num_elements() != x.shape.last()) {
      throw Failure("the weight's size is not that of the last axis");
    }
    if (skip && skip.shape.num_elements() != x.shape.num_elements()) throw Failure("x and skip differ in size");
    AddNorm job;
    job.x = x.data<float>();
    job.skip = skip.data<float>();
    job.weight = weight.data<float>();
    job.bias = bias.data<float>();
    job.normed = run.output<float>(0, x.shape);
    job.sum = run.output<float>(1, x.shape);
    job.num_rows = static_cast<size_t>(x.shape.num_rows());
    job.size = static_cast<size_t>(x.shape.last());
    job.epsilon = epsilon_;
    job.is_layer_norm = is_layer_norm_;
    kernels_.add_norm(job, run.parallel());
  }

 private:
  const NormKernels& kernels_;
  Weight weight_, bias_;
  float epsilon_;
  bool is_layer_norm_;
};

// stacked [..., 2 * size], gate before up -> activation(gate) * up, [..., size]; with a `limit`, clamped (norm.h)
class GateUpOp {
 public:
  static constexpr const char* NAME = "GateUp";
  static constexpr Port INPUTS[] = {{FLOAT}};
  static constexpr Port OUTPUTS[] = {{FLOAT}};

  explicit GateUpOp(const Info& info)
      : kernels_(norm_kernels()), limit_(info.number("limit", 0)), alpha_(info.number("alpha", 1)) {
    if (info.integer("gelu", 0) != 0) activation_ = Gate::gelu_tanh;
    if (limit_ > 0) activation_ = Gate::clamped;
  }

  void compute(Context& run) {
    const Tensor stacked = run.input(0);
    if (stacked.shape.count == 0 || stacked.shape.last() % 2 != 0) throw Failure("the last axis is not even");
    const int64_t size = stacked.shape.last() / 2;
    GateUp job;
    job.stacked = stacked.data<float>();
    job.gated = run.output<float>(0, stacked.shape.with_last(size));
    job.num_rows = static_cast<size_t>(stacked.shape.num_rows());
    job.size = static_cast<size_t>(size);
    job.activation = activation_;
    job.limit = limit_;
    job.alpha = alpha_;
    kernels_.gate_up(job, run.parallel());
  }

 private:
  const NormKernels& kernels_;
  Gate activation_ = Gate::silu;
  float limit_, alpha_;
};

}  // namespace ort
}  // namespace headrace
