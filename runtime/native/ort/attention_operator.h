// headrace.Attention, AttentionFloat16 and AttentionInt8: causal attention over packed tokens and cached slots.
//
// A plain loop, correct and slow, until the kernel of runtime/native/attention.h is here.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../vec.h"
#include "operator.h"

namespace headrace {
namespace ort {

// qkv [N, (heads + 2 kv_heads) * head_dim], past k and v [slots, kv_heads, capacity, head_dim]; slot, past_len and
// query_len [B]; cos and sin [max_len, rotary_dim / 2]; q_norm and k_norm [head_dim]; k_scale and v_scale
// [kv_heads * head_dim] -> out [N, heads * head_dim], present k and v: the memory of past.
template <ElementType CACHE>
class AttentionOp {
 public:
  static constexpr const char* NAME = CACHE == FLOAT ? "Attention" : CACHE == FLOAT16 ? "AttentionFloat16" : "AttentionInt8";
  static constexpr Port INPUTS[] = {{FLOAT}, {CACHE}, {CACHE}, {INT32}, {INT32}, {INT32},
                                    {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL},
                                    {FLOAT, OPTIONAL}, {FLOAT, OPTIONAL}};
  static constexpr Port OUTPUTS[] = {{FLOAT}, {CACHE}, {CACHE}};

  explicit AttentionOp(const Info& info)
      : num_heads_(info.integer("num_heads")),
        num_kv_heads_(info.integer("kv_num_heads")),
        window_(info.integer("local_window_size", 0)),
        is_interleaved_(info.integer("rotary_interleaved", 0) != 0),
        scale_(info.number("scale")),
        softcap_(info.number("softcap", 0)),
        epsilon_(info.number("epsilon", 1e-6f)) {}

  void compute(Context& run) {
    const Tensor qkv = run.input(0), k = run.input(1), v = run.input(2);
    const Tensor slot = run.input(3), past_len = run.input(4), query_len = run.input(5);
    const Tensor cos = run.input(6), sin = run.input(7), q_norm = run.input(8), k_norm = run.input(9);
    const Tensor k_scale = run.input(10), v_scale = run.input(11);
    if (k.shape.count != 4 || qkv.shape.count != 2) throw Failure("qkv has two dimensions, and a cache has four");
    const int64_t slots = k.shape[0], capacity = k.shape[2], dim = k.shape[3], num_tokens = qkv.shape[0];
    if (qkv.shape[1] != (num_heads_ + 2 * num_kv_heads_) * dim) throw Failure("qkv does not fit the heads");
    void* present_k = run.output<void>(1, k.shape);
    void* present_v = run.output<void>(2, v.shape);
    if (present_k != k.bytes || present_v != v.bytes) throw Failure("past and present must be the same memory");
    float* out = run.output<float>(0, {num_tokens, num_heads_ * dim});
    const int64_t num_rows = slot.shape[0], half = cos ? cos.shape[1] : 0, group = num_heads_ / num_kv_heads_;
    std::vector<float> head(dim), turned(dim), scores(capacity);
    int64_t token = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t where = slot.data<int32_t>()[row], past = past_len.data<int32_t>()[row];
      const int64_t count = query_len.data<int32_t>()[row];
      if (count < 0 || past < 0 || where < 0 || where >= slots || past + count > capacity || token + count > num_tokens) {
        throw Failure("a row outside its slot");
      }
      for (int64_t idx = 0; idx < count; ++idx, ++token) {
        const int64_t position = past + idx;
        const float* x = qkv.data<float>() + token * qkv.shape[1];
        const float* c = cos ? cos.data<float>() + position * half : nullptr;
        const float* s = cos ? sin.data<float>() + position * half : nullptr;
        for (int64_t kv = 0; kv < num_kv_heads_; ++kv) {
          const int64_t at = ((where * num_kv_heads_ + kv) * capacity + position) * dim;
          prepare(x + (num_heads_ + kv) * dim, k_norm, c, s, half, dim, head.data());
          write(present_k, at, head.data(), k_scale, kv, dim);
          write(present_v, at, x + (num_heads_ + num_kv_heads_ + kv) * dim, v_scale, kv, dim);
        }
        for (int64_t h = 0; h < num_heads_; ++h) {
          const int64_t kv = h / group, base = (where * num_kv_heads_ + kv) * capacity;
          const int64_t first = window_ > 0 && position + 1 > window_ ? position + 1 - window_ : 0;
          prepare(x + h * dim, q_norm, c, s, half, dim, head.data());
          float most = -INFINITY, total = 0;
          for (int64_t p = first; p <= position; ++p) {
            float score = 0;
            for (int64_t i = 0; i < dim; ++i) score += head[i] * read(present_k, (base + p) * dim + i, k_scale, kv * dim + i);
            score *= scale_;
            if (softcap_ > 0) score = softcap_ * std::tanh(score / softcap_);
            scores[p] = score;
            most = score > most ? score : most;
          }
          for (int64_t p = first; p <= position; ++p) total += scores[p] = std::exp(scores[p] - most);
          float* y = out + (token * num_heads_ + h) * dim;
          for (int64_t i = 0; i < dim; ++i) y[i] = 0;
          for (int64_t p = first; p <= position; ++p) {
            for (int64_t i = 0; i < dim; ++i) {
              y[i] += scores[p] / total * read(present_v, (base + p) * dim + i, v_scale, kv * dim + i);
            }
          }
        }
      }
    }
    if (token != num_tokens) throw Failure("qkv has other tokens than the rows");
  }

 private:
  // A head after its norm and its rotation.
  void prepare(const float* x, const Tensor& norm, const float* cos, const float* sin, int64_t half, int64_t dim,
               float* y) const {
    float squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
    const float factor = 1 / std::sqrt(squares / static_cast<float>(dim) + epsilon_);
    for (int64_t i = 0; i < dim; ++i) y[i] = norm ? x[i] * factor * norm.data<float>()[i] : x[i];
    for (int64_t i = 0; i < half; ++i) {
      float& a = y[is_interleaved_ ? 2 * i : i];
      float& b = y[is_interleaved_ ? 2 * i + 1 : i + half];
      const float real = a * cos[i] - b * sin[i], imaginary = b * cos[i] + a * sin[i];
      a = real;
      b = imaginary;
    }
  }

  static void write(void* cache, int64_t at, const float* x, const Tensor& scale, int64_t kv, int64_t dim) {
    for (int64_t i = 0; i < dim; ++i) {
      if constexpr (CACHE == FLOAT) {
        static_cast<float*>(cache)[at + i] = x[i];
      } else if constexpr (CACHE == FLOAT16) {
        static_cast<uint16_t*>(cache)[at + i] = generic::float_to_half(x[i]);
      } else {
        const float steps = std::nearbyint(x[i] * (1.0f / scale.data<float>()[kv * dim + i]));
        static_cast<int8_t*>(cache)[at + i] = static_cast<int8_t>(steps < -128 ? -128 : steps > 127 ? 127 : steps);
      }
    }
  }

  static float read(const void* cache, int64_t at, const Tensor& scale, int64_t channel) {
    if constexpr (CACHE == FLOAT) return static_cast<const float*>(cache)[at];
    if constexpr (CACHE == FLOAT16) return generic::half_to_float(static_cast<const uint16_t*>(cache)[at]);
    return static_cast<float>(static_cast<const int8_t*>(cache)[at]) * scale.data<float>()[channel];
  }

  int64_t num_heads_, num_kv_heads_, window_;
  bool is_interleaved_;
  float scale_, softcap_, epsilon_;
};

}  // namespace ort
}  // namespace headrace
