// headrace.BlockLinear and headrace.ChannelLinear: products with weights that are packed when a session is made.
#pragma once

#include "../linear/linear.h"
#include "../linear/memory.h"
#include "operator.h"

namespace headrace {
namespace ort {

// Packed weights, and the run that both operators share.
class PackedLinear {
 protected:
  explicit PackedLinear(const LinearKernels& kernels) : kernels_(kernels) {}

  uint8_t* allocate() {
    packed_ = allocate_weights(static_cast<size_t>(shape_.packed_bytes()));
    return packed_.get();
  }

  void multiply(Context& run, float x_scale) const {
    const Tensor x = run.input(0);
    if (x.shape.count == 0 || x.shape.last() != shape_.num_inputs) throw Failure("x does not fit the weights");
    float* y = run.output<float>(0, x.shape.with_last(shape_.num_outputs));
    kernels_.multiply(shape_, packed_.get(), x.data<float>(), x.shape.num_rows(), x_scale, y, run.parallel());
  }

  const LinearKernels& kernels_;
  WeightShape shape_{};
  WeightMemory packed_;
};

// x [..., K], values [N, K / block_size, block_size * bits / 8] and scales as MatMulNBits has them, zero points
// [N, ceil(K / block_size * bits / 8)]; the last three are constants -> [..., N]
class BlockLinearOp : PackedLinear {
 public:
  static constexpr const char* NAME = "BlockLinear";
  static constexpr Port INPUTS[] = {{FLOAT}, {UINT8}, {FLOAT}, {UINT8, OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{FLOAT}};

  explicit BlockLinearOp(const Info& info) : PackedLinear(linear_kernels()) {
    const Tensor values = info.constant(1), scales = info.constant(2), zero_points = info.constant(3);
    if (!values || !scales) throw Failure("values and scales must be constants");
    shape_.num_outputs = info.integer("N");
    shape_.num_inputs = info.integer("K");
    shape_.block_size = info.integer("block_size");
    shape_.bits = static_cast<int32_t>(info.integer("bits"));
    shape_.has_zero_points = bool(zero_points);
    shape_.has_block_scales = 1;
    if (shape_.bits != 4 && shape_.bits != 8) throw Failure("bits must be 4 or 8");
    if (shape_.block_size < 8 || shape_.block_size % 8 != 0) throw Failure("block_size must be a multiple of 8");
    const int64_t num_blocks = shape_.num_outputs * shape_.num_blocks();
    const int64_t zero_bytes = shape_.num_outputs * ((shape_.num_blocks() * shape_.bits + 7) / 8);
    if (values.shape.num_elements() != num_blocks * shape_.block_size * shape_.bits / 8 ||
        scales.shape.num_elements() != num_blocks ||
        (zero_points && zero_points.shape.num_elements() != zero_bytes)) {
      throw Failure("values, scales or zero points do not fit N, K, bits and block_size");
    }
    kernels_.pack_blocks(shape_, values.data<uint8_t>(), scales.data<float>(), zero_points.data<uint8_t>(), allocate(),
                         sequential());
  }

  void compute(Context& run) const { multiply(run, 0); }
};

// x [..., K], values int8 [K, N] and scales [N], both constants -> [..., N]. `scale` of x is calibrated; without it, each
// `group_size` inputs of a row (all, if 0) get a scale of their own.
class ChannelLinearOp : PackedLinear {
 public:
  static constexpr const char* NAME = "ChannelLinear";
  static constexpr Port INPUTS[] = {{FLOAT}, {INT8}, {FLOAT}};
  static constexpr Port OUTPUTS[] = {{FLOAT}};

  explicit ChannelLinearOp(const Info& info) : PackedLinear(linear_kernels()) {
    const Tensor values = info.constant(1), scales = info.constant(2);
    if (!values || !scales) throw Failure("values and scales must be constants");
    if (values.shape.count != 2 || scales.shape.num_elements() != values.shape[1]) {
      throw Failure("values must be [K, N] and scales [N]");
    }
    x_scale_ = info.number("scale", 0);
    const int64_t group_size = info.integer("group_size", 0);
    if (group_size < 0 || group_size % 8 != 0) throw Failure("group_size must be a multiple of 8");
    if (x_scale_ > 0 && group_size != 0) throw Failure("a calibrated scale is for the whole row");
    shape_.num_inputs = values.shape[0];
    shape_.num_outputs = values.shape[1];
    shape_.block_size = group_size == 0 || group_size > shape_.num_inputs ? shape_.num_inputs : group_size;
    shape_.bits = 8;
    kernels_.pack_channels(shape_, values.data<int8_t>(), scales.data<float>(), allocate(), sequential());
  }

  void compute(Context& run) const { multiply(run, x_scale_); }

 private:
  float x_scale_;
};

}  // namespace ort
}  // namespace headrace
