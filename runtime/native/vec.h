// Vectors for kernels: GCC and Clang vector types, and the few instructions that the compiler does not find itself.
//
// A kernel source is compiled once for each variant, into the namespace HEADRACE_VARIANT (avx512vnni, avx2, generic).
// `Vec` holds WIDTH floats of that variant: 16, 8 or 4. Operators (+, *, <) and `select` are the compiler's own; every
// function here gives the same value for an element wherever the element stands in the vector. `fma` is one rounding
// where the processor has the instruction and two where it has not; it is the same in every loop of a variant, so use
// it, never a * b + c, where two code paths must agree to the bit (build.py passes -ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(HEADRACE_VARIANT)
#define HEADRACE_VARIANT generic
#endif

#define HEADRACE_INLINE inline __attribute__((always_inline))

namespace headrace {
namespace HEADRACE_VARIANT {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t VecI __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t VecU __attribute__((vector_size(WIDTH * 4)));
typedef int8_t VecI8 __attribute__((vector_size(WIDTH * 4)));   // as many bytes as a Vec has, for dot products
typedef uint8_t VecU8 __attribute__((vector_size(WIDTH * 4)));

template <typename V, typename T>
HEADRACE_INLINE V load_as(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

HEADRACE_INLINE Vec load(const float* from) { return load_as<Vec>(from); }
HEADRACE_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }
HEADRACE_INLINE Vec splat(float value) { return value - Vec{}; }
HEADRACE_INLINE VecI splat_int(int32_t value) { return value - VecI{}; }
HEADRACE_INLINE Vec bits_as_float(VecI bits) { return (Vec)bits; }
HEADRACE_INLINE VecI bits_as_int(Vec value) { return (VecI)value; }
HEADRACE_INLINE Vec to_float(VecI value) { return __builtin_convertvector(value, Vec); }
// Cuts the fraction off. The value must fit int32.
HEADRACE_INLINE VecI truncate(Vec value) { return __builtin_convertvector(value, VecI); }

// mask is a comparison's result: all bits of an element set, or none.
HEADRACE_INLINE Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }

// Where a is not a number the result is b, as in the processor's instruction.
HEADRACE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
HEADRACE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

HEADRACE_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// a * b + c, with one rounding where the processor can.
HEADRACE_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < WIDTH; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// The nearest whole number, ties to even: |value| must stay below 2^22.
HEADRACE_INLINE Vec round_even(Vec value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no bit for a fraction
  return (value + magic) - magic;
#endif
}

HEADRACE_INLINE VecI to_int_even(Vec value) { return truncate(round_even(value)); }

// Sums by halves: the order is fixed for a variant, whatever the compiler.
HEADRACE_INLINE float sum(Vec value) {
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) value[i] += value[i + half];
  }
  return value[0];
}

HEADRACE_INLINE float max_of(Vec value) {
  float most = value[0];
  for (int i = 1; i < WIDTH; ++i) most = value[i] > most ? value[i] : most;
  return most;
}

// ---- float16: WIDTH numbers of 2 bytes. Rounding is to nearest, ties to even.

HEADRACE_INLINE float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  uint32_t bits = half & 0x7fff;
  float value;
  if (bits >= 0x7c00) {  // infinity, not a number
    bits = sign | 0x7f800000 | (bits & 0x3ff) << 13;
    std::memcpy(&value, &bits, 4);
  } else if (bits >= 0x400) {
    bits = sign | ((bits << 13) + 0x38000000);
    std::memcpy(&value, &bits, 4);
  } else {  // subnormal or zero: a whole number of 2^-24
    value = (float)bits * 5.9604644775390625e-8f;
    if (sign) value = -value;
  }
  return value;
#endif
}

HEADRACE_INLINE uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds past 65504
  if (bits < 0x38800000) {                                   // subnormal: the sum's last bit is 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t sum_bits;
    std::memcpy(&sum_bits, &magnitude, 4);
    return (uint16_t)(sign | (sum_bits - 0x3f000000));
  }
  const uint32_t odd = bits >> 13 & 1;
  return (uint16_t)(sign | ((bits + 0xfff + odd - 0x38000000) >> 13));
#endif
}

HEADRACE_INLINE Vec load_half(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  Vec value;
  for (int i = 0; i < WIDTH; ++i) value[i] = half_to_float(from[i]);
  return value;
#endif
}

HEADRACE_INLINE void store_half(uint16_t* to, Vec value) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &halves, sizeof(halves));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i halves = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &halves, sizeof(halves));
#else
  for (int i = 0; i < WIDTH; ++i) to[i] = float_to_half(value[i]);
#endif
}

// ---- bytes

// WIDTH signed bytes as floats.
HEADRACE_INLINE Vec load_int8(const int8_t* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
#elif defined(__AVX2__)
  int64_t bytes;
  std::memcpy(&bytes, from, 8);
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
#else
  Vec value;
  for (int i = 0; i < WIDTH; ++i) value[i] = (float)from[i];
  return value;
#endif
}

// The low byte of each of WIDTH whole numbers, which must lie in -128..127.
HEADRACE_INLINE void store_int8(int8_t* to, VecI value) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)value);
  std::memcpy(to, &bytes, sizeof(bytes));
#else
  for (int i = 0; i < WIDTH; ++i) to[i] = (int8_t)value[i];
#endif
}

// sums[i] += unsigned bytes 4i..4i+3 of a times signed bytes 4i..4i+3 of b, exact: no step saturates.
HEADRACE_INLINE VecI dot_bytes(VecI sums, VecU8 a, VecI8 b) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  // pmaddubsw saturates its sum of two products, so even and odd bytes go to 16 bits first.
  const __m256i a_even = _mm256_and_si256((__m256i)a, _mm256_set1_epi16(0xff));
  const __m256i a_odd = _mm256_srli_epi16((__m256i)a, 8);
  const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8);
  const __m256i b_odd = _mm256_srai_epi16((__m256i)b, 8);
  const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(a_even, b_even), _mm256_madd_epi16(a_odd, b_odd));
  return sums + (VecI)both;
#else
  for (int i = 0; i < WIDTH; ++i) {
    for (int j = 0; j < 4; ++j) sums[i] += (int32_t)a[4 * i + j] * (int32_t)b[4 * i + j];
  }
  return sums;
#endif
}

// ---- functions that the processor does not have: exp and what is made of it. No call of the C library.

// The first `count` floats, and zeros behind them.
HEADRACE_INLINE Vec load_first(const float* from, size_t count) {
  Vec value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

HEADRACE_INLINE void store_first(float* to, Vec value, size_t count) { std::memcpy(to, &value, count * sizeof(float)); }

// Calls visit(offset, count) for each vector of a row; count is WIDTH but for the last.
template <typename Visit>
HEADRACE_INLINE void each_vector(size_t size, Visit&& visit) {
  size_t offset = 0;
  for (; offset + WIDTH <= size; offset += WIDTH) visit(offset, size_t{WIDTH});
  if (offset < size) visit(offset, size - offset);
}

HEADRACE_INLINE Vec load_some(const float* from, size_t count) {
  return count == WIDTH ? load(from) : load_first(from, count);
}

HEADRACE_INLINE void store_some(float* to, Vec value, size_t count) {
  if (count == WIDTH) {
    store(to, value);
  } else {
    store_first(to, value, count);
  }
}

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
