// What happens to one head of one new token: norm, rotary embedding, rounding to the cache's type.
//
// It is the same code for every call, so that a token's key, value and query depend on nothing beside it. Products of
// the rotary embedding are rounded before they are added, as numpy rounds them.
#pragma once

#include "attention.h"
#include "softmax_math.h"

namespace headrace {
namespace HEADRACE_VARIANT {

// x / sqrt(mean of squares + epsilon) * weight
inline void norm_head(float* x, const float* weight, int dim, float epsilon) {
  Vec squares = {};
  int channel = 0;
  for (; channel + WIDTH <= dim; channel += WIDTH) squares = fma(load(x + channel), load(x + channel), squares);
  float total = sum(squares);
  for (; channel < dim; ++channel) total = fma(x[channel], x[channel], total);
  const float inverse = 1.0f / __builtin_sqrtf(total / (float)dim + epsilon);
  for (channel = 0; channel < dim; ++channel) x[channel] = x[channel] * inverse * weight[channel];
}

// cos, sin: of the token's position, [rotary_dim / 2]
inline void rotate_head(float* x, const float* cos, const float* sin, int rotary_dim, bool is_interleaved) {
  const int half = rotary_dim / 2;
  if (is_interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  int i = 0;
  for (; i + WIDTH <= half; i += WIDTH) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

// A query or key head as attention uses it, from the packed product to `to`; weight: of its norm, or null.
inline void prepare_head(const AttentionCall& call, const float* from, const float* weight, int64_t position, float* to) {
  std::memcpy(to, from, sizeof(float) * (size_t)call.head_dim);
  if (weight) norm_head(to, weight, call.head_dim, call.epsilon);
  if (call.cos) {
    const int64_t row = position * (call.rotary_dim / 2);
    rotate_head(to, call.cos + row, call.sin + row, call.rotary_dim, call.is_interleaved);
  }
}

inline void round_head(const float* x, const float*, int dim, float* to) { std::memcpy(to, x, sizeof(float) * (size_t)dim); }

// What is too large for float16 becomes its largest number.
inline void round_head(const float* x, const float*, int dim, uint16_t* to) {
  constexpr float MOST = 65504.0f;
  int channel = 0;
  for (; channel + WIDTH <= dim; channel += WIDTH) {
    store_half(to + channel, max(splat(-MOST), min(splat(MOST), load(x + channel))));
  }
  for (; channel < dim; ++channel) {
    const float value = x[channel] > MOST ? MOST : x[channel];
    to[channel] = float_to_half(value < -MOST ? -MOST : value);
  }
}

// scale: of each channel. Rounds x * (1 / scale) to the nearest whole number, ties to even, within -128..127.
inline void round_head(const float* x, const float* scale, int dim, int8_t* to) {
  float padded[WIDTH], steps[WIDTH];
  int8_t small[WIDTH];
  for (int channel = 0; channel < dim; channel += WIDTH) {
    const int count = dim - channel < WIDTH ? dim - channel : WIDTH;
    Vec value, step;
    if (count == WIDTH) {
      value = load(x + channel);
      step = load(scale + channel);
    } else {
      for (int i = 0; i < WIDTH; ++i) padded[i] = i < count ? x[channel + i] : 0.0f;
      for (int i = 0; i < WIDTH; ++i) steps[i] = i < count ? scale[channel + i] : 1.0f;
      value = load(padded);
      step = load(steps);
    }
    const Vec inside = min(max(value * (splat(1.0f) / step), splat(-128.0f)), splat(127.0f));
    store_int8(small, to_int_even(inside));
    std::memcpy(to + channel, small, (size_t)count);
  }
}

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
