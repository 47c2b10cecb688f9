// Sums of products of unsigned and signed bytes, and rows of floats as signed bytes.
//
// Knows the instructions of each variant. Knows no matrices.
//
// A step multiplies the bytes of 4 inputs for WIDTH outputs. Weights are unsigned, with a zero point that the caller
// takes off by starting sums at -zero_point * (sum of the inputs' bytes).
#pragma once

#include "../vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {

HEADRACE_INLINE int32_t load_int(const int8_t* from) { return load_as<int32_t>(from); }

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// pmaddubsw adds two products in 16 bits. Halves of bytes cannot overflow there: 2 * 15 * 128 a step, 8 steps long.
// So a byte's low and high halves have sums of their own, and the high ones count 16 times.
constexpr int MAX_STEPS = 8;

struct Weights {
  __m256i low, high;
};

template <int BITS>
struct Sums {
  VecI sums;
  __m256i low, high;
  HEADRACE_INLINE void clear(VecI start) {
    sums = start;
    low = high = _mm256_setzero_si256();
  }
  HEADRACE_INLINE void add(Weights weights, int32_t inputs) {
    const __m256i all = _mm256_set1_epi32(inputs);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(weights.low, all));
    if (BITS == 8) high = _mm256_add_epi16(high, _mm256_maddubs_epi16(weights.high, all));
  }
  // Moves the 16-bit sums to 32 bits; to be called after at most MAX_STEPS steps.
  HEADRACE_INLINE void widen() {
    sums += (VecI)_mm256_madd_epi16(low, _mm256_set1_epi16(1));
    if (BITS == 8) sums += (VecI)_mm256_madd_epi16(high, _mm256_set1_epi16(16));
    low = high = _mm256_setzero_si256();
  }
};

HEADRACE_INLINE __m256i halves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
HEADRACE_INLINE Weights whole_bytes(const uint8_t* from) {
  const __m256i bytes = load_as<__m256i>(from);
  return {halves(bytes), halves(_mm256_srli_epi16(bytes, 4))};
}
HEADRACE_INLINE Weights low_halves(const uint8_t* from) { return {halves(load_as<__m256i>(from)), __m256i{}}; }
HEADRACE_INLINE Weights high_halves(const uint8_t* from) {
  return {halves(_mm256_srli_epi16(load_as<__m256i>(from), 4)), __m256i{}};
}

#else

constexpr int MAX_STEPS = 1 << 30;

struct Weights {
  VecU8 bytes;
};

template <int BITS>
struct Sums {
  VecI sums;
  HEADRACE_INLINE void clear(VecI start) { sums = start; }
  HEADRACE_INLINE void add(Weights weights, int32_t inputs) {
    sums = dot_bytes(sums, weights.bytes, (VecI8)splat_int(inputs));
  }
  HEADRACE_INLINE void widen() {}
};

HEADRACE_INLINE Weights whole_bytes(const uint8_t* from) { return {load_as<VecU8>(from)}; }
HEADRACE_INLINE Weights low_halves(const uint8_t* from) { return {load_as<VecU8>(from) & 15}; }
HEADRACE_INLINE Weights high_halves(const uint8_t* from) { return {(VecU8)((load_as<VecU>(from) >> 4) & 0x0f0f0f0f)}; }

#endif

// A block of a row as int8. In memory its bytes follow.
struct RowBlock {
  float scale;
  int32_t start;  // where the sums of products start: -zero_point * (sum of the bytes)

  int8_t* bytes() { return reinterpret_cast<int8_t*>(this + 1); }
};

// WIDTH unsigned bytes.
HEADRACE_INLINE VecI load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepu8_epi32(load_as<__m128i>(from));
#else
  VecI value;
  for (int i = 0; i < WIDTH; ++i) value[i] = from[i];
  return value;
#endif
}

// Sums of integers are exact in any order.
HEADRACE_INLINE int32_t sum_of(VecI value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)value);
#else
  int32_t total = 0;
  for (int i = 0; i < WIDTH; ++i) total += value[i];
  return total;
#endif
}

HEADRACE_INLINE int32_t largest_of(VecI value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)value);
#else
  int32_t most = value[0];
  for (int i = 1; i < WIDTH; ++i) most = value[i] > most ? value[i] : most;
  return most;
#endif
}

HEADRACE_INLINE Vec clamp(Vec value, float low, float high) { return max(min(value, splat(high)), splat(low)); }

// The nearest whole number, ties to even. What is not a number becomes any number.
HEADRACE_INLINE VecI nearest(Vec value) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtps_epi32((__m256)value);
#else
  return to_int_even(value);
#endif
}

// Calls step(i, count) for each vector of `size` floats: count of them exist, the others are zeros.
template <typename Step>
HEADRACE_INLINE void each_vector(int64_t count, int64_t size, Step&& step) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) step(i, int64_t{WIDTH});
  for (; i < size; i += WIDTH) step(i, count - i);
}

HEADRACE_INLINE Vec load_some(const float* from, int64_t count) {
  if (count >= WIDTH) return load(from);
  Vec value = {};
  if (count > 0) std::memcpy(&value, from, size_t(count) * 4);
  return value;
}

HEADRACE_INLINE void store_some(int8_t* to, VecI value, int64_t count) {
  if (count >= WIDTH) {
    store_int8(to, value);
  } else {
    int8_t bytes[WIDTH];
    store_int8(bytes, value);
    std::memcpy(to, bytes, size_t(count));
  }
}

// The largest magnitude; not a number if any of the values is not.
HEADRACE_INLINE float largest(const float* x, int64_t count) {
  VecI most = {};
  each_vector(count, count, [&](int64_t i, int64_t left) {
    // Bits of floats without a sign are in the order of their values, and what is not a number lies above infinity.
    const VecI bits = bits_as_int(load_some(x + i, left)) & 0x7fffffff;
    most = bits > most ? bits : most;
  });
  const int32_t top = largest_of(most);
  return load_as<float>(&top);
}

// `count` floats as bytes with the scale that lets the largest become 127. `size` bytes are written, the rest 0.
HEADRACE_INLINE void quantize_block(const float* x, int64_t count, int64_t size, int32_t zero_point, RowBlock* to) {
  const float most = largest(x, count);
  const Vec inverse = splat(most > 0 ? 127.0f / most : 0.0f);
  VecI total = {};
  each_vector(count, size, [&](int64_t i, int64_t left) {
    const VecI value = nearest(load_some(x + i, left) * inverse);
    total += value;
    store_some(to->bytes() + i, value, size - i);
  });
  to->scale = most / 127.0f;
  to->start = -zero_point * sum_of(total);
}

// The same with a given scale: values beyond -128..127 steps are cut.
HEADRACE_INLINE void quantize_block(const float* x, int64_t count, int64_t size, int32_t zero_point, float scale,
                                    RowBlock* to) {
  const Vec inverse = splat(1 / scale);
  VecI total = {};
  each_vector(count, size, [&](int64_t i, int64_t left) {
    const VecI value = nearest(clamp(load_some(x + i, left) * inverse, -128, 127));
    total += value;
    store_some(to->bytes() + i, value, size - i);
  });
  to->scale = scale;
  to->start = -zero_point * sum_of(total);
}

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
