// headrace.Attention, AttentionFloat16 and AttentionInt8: an operator for each type of cache.
#pragma once

#include "../attention/attention.h"
#include "operator.h"

namespace headrace {
namespace ort {

// Packed qkv of new tokens, a KV cache, and where each row lives in it -> attention's output, and the cache.
//
// qkv [N, (num_heads + 2 * kv_num_heads) * head_dim]; past k and v [slots, kv_num_heads, capacity, head_dim] in float32,
// float16 or int8; slot, past_len, query_len int32 [rows]; cos and sin [max_len, rotary_dim / 2]; norms of queries and
// keys [head_dim]; scales of an int8 cache [kv_num_heads * head_dim]; sinks [num_heads]. The present cache is bound to the memory of the
// past one.
template <ElementType CACHE>
class AttentionOp {
 public:
  static constexpr const char* NAME = CACHE == FLOAT ? "Attention" : CACHE == FLOAT16 ? "AttentionFloat16" : "AttentionInt8";
  static constexpr Port INPUTS[] = {{FLOAT}, {CACHE}, {CACHE}, {INT32}, {INT32}, {INT32},
                                    {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL},
                                    {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{FLOAT}, {CACHE}, {CACHE}};

  explicit AttentionOp(const Info& info) : kernels_(attention_kernels()) {
    call_.num_heads = static_cast<int32_t>(info.integer("num_heads"));
    call_.num_kv_heads = static_cast<int32_t>(info.integer("kv_num_heads"));
    call_.scale = info.number("scale");
    call_.softcap = info.number("softcap", 0.0f);
    call_.window = static_cast<int32_t>(info.integer("local_window_size", 0));
    call_.is_interleaved = static_cast<int32_t>(info.integer("rotary_interleaved", 0));
    call_.epsilon = info.number("epsilon", 1e-6f);
    call_.cache_type = CACHE == FLOAT ? CACHE_FLOAT32 : CACHE == FLOAT16 ? CACHE_FLOAT16 : CACHE_INT8;
    if (call_.num_kv_heads <= 0 || call_.num_heads % call_.num_kv_heads != 0) {
      throw Failure("num_heads is no multiple of kv_num_heads");
    }
  }

  void compute(Context& run) {
    const Tensor qkv = run.input(0), keys = run.input(1), values = run.input(2);
    const Tensor slot = run.input(3), past_len = run.input(4), query_len = run.input(5);
    const Tensor cos = run.input(6), sin = run.input(7), q_norm = run.input(8), k_norm = run.input(9);
    const Tensor k_scale = run.input(10), v_scale = run.input(11), sinks = run.input(12);
    AttentionCall call = call_;
    if (keys.shape.count != 4 || values.shape.num_elements() != keys.shape.num_elements()) {
      throw Failure("past k and v are [slots, kv_num_heads, capacity, head_dim], both alike");
    }
    const int64_t dim = keys.shape[3];
    call.num_slots = keys.shape[0];
    call.capacity = keys.shape[2];
    call.head_dim = static_cast<int32_t>(dim);
    call.num_rows = static_cast<int32_t>(slot.shape.num_elements());
    if (past_len.shape.num_elements() != call.num_rows || query_len.shape.num_elements() != call.num_rows) {
      throw Failure("slot, past_len and query_len differ in length");
    }
    if (qkv.shape.count == 0 || keys.shape[1] != call.num_kv_heads || qkv.shape.last() != (call.num_heads + 2 * call.num_kv_heads) * dim) {
      throw Failure("qkv does not have the heads of the attributes and of the cache");
    }
    require(q_norm, dim);
    require(k_norm, dim);
    require(k_scale, call.num_kv_heads * dim);
    require(v_scale, call.num_kv_heads * dim);
    require(sinks, call.num_heads);
    call.rotary_dim = cos ? static_cast<int32_t>(2 * cos.shape.last()) : 0;
    call.qkv = qkv.data<float>();
    call.slot = slot.data<int32_t>();
    call.past_len = past_len.data<int32_t>();
    call.query_len = query_len.data<int32_t>();
    call.cos = cos.data<float>();
    call.sin = sin.data<float>();
    call.q_norm = q_norm.data<float>();
    call.k_norm = k_norm.data<float>();
    call.k_scale = k_scale.data<float>();
    call.v_scale = v_scale.data<float>();
    call.sinks = sinks.data<float>();
    if (const char* fault = find_fault(call)) throw Failure(fault);
    int64_t num_tokens = 0;
    for (int32_t row = 0; row < call.num_rows; ++row) {
      num_tokens += call.query_len[row];
      if (cos && call.query_len[row] && call.past_len[row] + call.query_len[row] > cos.shape.num_rows()) {
        throw Failure("a row is longer than the rotary tables");
      }
    }
    if (num_tokens != qkv.shape.num_rows()) throw Failure("qkv has another number of tokens than query_len says");
    call.out = run.output<float>(0, qkv.shape.with_last(call.num_heads * dim));
    call.key_cache = in_place(run, 1, keys);
    call.value_cache = in_place(run, 2, values);
    if (!kernels_.attend(call, run.parallel())) throw Failure("no memory");
  }

 private:
  static void require(const Tensor& tensor, int64_t size) {
    if (tensor && tensor.shape.num_elements() != size) throw Failure("a norm or a scale has the wrong size");
  }

  static void* in_place(Context& run, size_t index, const Tensor& past) {
    void* present = run.output<void>(index, past.shape);
    if (present != past.bytes && past.shape.num_elements() > 0) throw Failure("past and present must be the same memory");
    return present;
  }

  const AttentionKernels& kernels_;
  AttentionCall call_{};
};

}  // namespace ort
}  // namespace headrace
