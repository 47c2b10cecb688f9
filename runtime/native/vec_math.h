// Functions of vectors that the processor does not have: exp and what is made of it. No call of the C library.
#pragma once

#include "vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {

// The first `count` floats, and zeros behind them.
HEADRACE_INLINE Vec load_first(const float* from, size_t count) {
  Vec value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

HEADRACE_INLINE void store_first(float* to, Vec value, size_t count) { std::memcpy(to, &value, count * sizeof(float)); }

// e^x, off by at most 2 units in the last place for -87.3 <= x <= 88.3; beyond, the value at that end. NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 6 (Taylor's is off by 1.2e-7 there; the last
// coefficients are moved to spread the error), 2^n through the exponent's bits. ln 2 in two parts keeps r exact.
HEADRACE_INLINE Vec exp(Vec x) {
  x = max(splat(-87.3f), min(splat(88.3f), x));
  const Vec n = round_even(x * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  const VecI exponent = (truncate(n) + splat_int(127)) << 23;
  return p * bits_as_float(exponent);
}

// x / (1 + e^-x)
HEADRACE_INLINE Vec silu(Vec x) { return x / (splat(1.0f) + exp(-x)); }

// x / 2 * (1 + tanh(u)) = x / (1 + e^-2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)
HEADRACE_INLINE Vec gelu_tanh(Vec x) {
  const Vec u2 = x * fma(x * x, splat(0.0713548162f), splat(1.5957691216f));
  return x / (splat(1.0f) + exp(-u2));
}

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
