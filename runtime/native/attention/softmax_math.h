// exp2 and what else a vector needs for softmax.
#pragma once

#include "../vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {

// A score that no real score is below. Finite, so that a difference of two is a number.
constexpr float LOWEST = -1e30f;

// 2^x for x <= 0, within 1 ulp of the true value; 0 below -126.5 and for -infinity; 1 for 0; not a number stays.
// 2^x = 2^n * 2^f with n whole and |f| <= 1/2; 2^f = 1 + f * Q(f), Q fitted for the least largest relative error (2e-9).
HEADRACE_INLINE Vec exp2_nonpositive(Vec x) {
  x = max(splat(-127.0f), x);
  const Vec whole = round_even(x);
  const Vec f = x - whole;
  Vec power = splat(0x1.41fbbcp-13f);
  power = fma(power, f, splat(0x1.5f3e52p-10f));
  power = fma(power, f, splat(0x1.3b2d4cp-7f));
  power = fma(power, f, splat(0x1.c6aee8p-5f));
  power = fma(power, f, splat(0x1.ebfbdcp-3f));
  power = fma(power, f, splat(0x1.62e430p-1f));
  power = fma(power, f, splat(1.0f));
  return power * bits_as_float((truncate(whole) + 127) << 23);
}

HEADRACE_INLINE float exp2_nonpositive(float x) { return exp2_nonpositive(splat(x))[0]; }

// tanh(y * ln(2) / 2), from exp2(-|y|).
HEADRACE_INLINE Vec tanh_of_log2(Vec y) {
  const VecI sign = bits_as_int(y) & splat_int((int32_t)0x80000000);
  const Vec small = exp2_nonpositive(bits_as_float(bits_as_int(y) | splat_int((int32_t)0x80000000)));
  const Vec result = (splat(1.0f) - small) / (splat(1.0f) + small);
  return bits_as_float(bits_as_int(result) | sign);
}

HEADRACE_INLINE VecI lane_numbers() {
  VecI lanes;
  for (int i = 0; i < WIDTH; ++i) lanes[i] = i;
  return lanes;
}

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
