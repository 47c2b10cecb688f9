// The two products of attention for a few query rows, and the softmax between them.
//
// The sums of one query row have one order, whatever rows and keys are computed beside them: a score is summed over
// channels in turn; the sum of exponentials over the keys of a lane in turn, then over the lanes by halves; an output
// channel over keys in turn.
#pragma once

#include "softmax_math.h"

namespace headrace {
namespace HEADRACE_VARIANT {

constexpr int MOST_ROWS = 6;                          // query rows of a tile
constexpr int MOST_VECTORS = WIDTH == 16 ? 4 : 2;     // vectors of keys or channels beside them: 24 or 12 sums in registers

HEADRACE_INLINE Vec load_elements(const float* from) { return load(from); }
HEADRACE_INLINE Vec load_elements(const uint16_t* from) { return load_half(from); }
HEADRACE_INLINE Vec load_elements(const int8_t* from) { return load_int8(from); }
HEADRACE_INLINE float load_element(const float* from) { return *from; }
HEADRACE_INLINE float load_element(const uint16_t* from) { return half_to_float(*from); }
HEADRACE_INLINE float load_element(const int8_t* from) { return (float)*from; }

// Rows of a square of WIDTH x WIDTH become columns.
HEADRACE_INLINE void transpose(Vec (&x)[WIDTH]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = (__m512)x[i];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: channels c, c + 1 of both
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: channel 4 * lane + j of rows i..i+3
    a[i] = (__m512)_mm512_unpacklo_pd((__m512d)b[i], (__m512d)b[i + 2]);
    a[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[i], (__m512d)b[i + 2]);
    a[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
    a[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low02 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), low13 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    x[j] = (Vec)_mm512_shuffle_f32x4(low02, high02, 0x88);
    x[4 + j] = (Vec)_mm512_shuffle_f32x4(low13, high13, 0x88);
    x[8 + j] = (Vec)_mm512_shuffle_f32x4(low02, high02, 0xdd);
    x[12 + j] = (Vec)_mm512_shuffle_f32x4(low13, high13, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = (__m256)x[i];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    x[j] = (Vec)_mm256_permute2f128_ps(a[j], a[4 + j], 0x20);
    x[4 + j] = (Vec)_mm256_permute2f128_ps(a[j], a[4 + j], 0x31);
  }
#else
  Vec y[WIDTH];
  for (int i = 0; i < WIDTH; ++i) {
    for (int j = 0; j < WIDTH; ++j) y[j][i] = x[i][j];
  }
  for (int i = 0; i < WIDTH; ++i) x[i] = y[i];
#endif
}

// Memory that will be read soon. Arithmetic and memory work at the same time if the one asks ahead for the other.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;

  void start(const void* from, int64_t num_bytes) {
    at = static_cast<const char*>(from);
    end = at + num_bytes;
  }

  // Ask for the next so many cache lines of 64 bytes.
  HEADRACE_INLINE void step(int num_lines) {
    if (at >= end) return;
    for (int line = 0; line < num_lines; ++line) __builtin_prefetch(at + 64 * line, 0, 2);
    at += 64 * num_lines;
  }
};

// Load a square of WIDTH keys (rows `stride` apart) and WIDTH channels. Rows from `count` on are zeros and are not read.
template <typename T>
HEADRACE_INLINE void load_square(const T* from, int64_t stride, int count, Vec (&square)[WIDTH]) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) {
    square[i] = i < count ? load_elements(from) : Vec{};
    from += stride;
    __asm__("" : "+r"(from));  // or the compiler keeps WIDTH addresses, and spills them
  }
}

// Pack keys [num_keys, dim] into panels of WIDTH keys, [panel][dim][WIDTH]; the last panel is filled up with zeros.
template <typename T>
void pack_keys(const T* keys, int num_keys, int dim, float* panels) {
  for (int first = 0; first < num_keys; first += WIDTH, panels += dim * WIDTH) {
    const int count = num_keys - first < WIDTH ? num_keys - first : WIDTH;
    const T* rows = keys + (int64_t)first * dim;
    int channel = 0;
    if (count == WIDTH) {
      for (; channel + WIDTH <= dim; channel += WIDTH) {
        Vec square[WIDTH];
        load_square(rows + channel, dim, WIDTH, square);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) store(panels + (channel + i) * WIDTH, square[i]);
      }
    } else {
      for (; channel + WIDTH <= dim; channel += WIDTH) {
        Vec square[WIDTH];
        load_square(rows + channel, dim, count, square);
        transpose(square);
        for (int i = 0; i < WIDTH; ++i) store(panels + (channel + i) * WIDTH, square[i]);
      }
    }
    for (; channel < dim; ++channel) {
      for (int i = 0; i < WIDTH; ++i) panels[channel * WIDTH + i] = i < count ? load_element(rows + i * dim + channel) : 0.0f;
    }
  }
}

// Values [num_keys, dim] as floats [num_keys, padded_dim], the padding zeros.
template <typename T>
void widen_values(const T* values, int num_keys, int dim, int padded_dim, float* out) {
  for (int key = 0; key < num_keys; ++key, values += dim, out += padded_dim) {
    int channel = 0;
    for (; channel + WIDTH <= dim; channel += WIDTH) store(out + channel, load_elements(values + channel));
    for (; channel < padded_dim; ++channel) out[channel] = channel < dim ? load_element(values + channel) : 0.0f;
  }
}

// Scores of ROWS query rows with VECTORS panels of keys: scores[row][key] = sum over channels of q * k.
template <int ROWS, int VECTORS>
HEADRACE_INLINE void score_tile(const float* queries, int dim, const float* panels, float* scores, int scores_stride) {
  Vec sums[ROWS][VECTORS] = {};
  for (int channel = 0; channel < dim; ++channel) {
    Vec keys[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) keys[j] = load(panels + ((int64_t)j * dim + channel) * WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vec query = splat(queries[i * dim + channel]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = fma(query, keys[j], sums[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(scores + i * scores_stride + j * WIDTH, sums[i][j]);
  }
}

template <int ROWS>
void score_rows(const float* queries, int dim, const float* panels, int num_panels, float* scores, int scores_stride) {
  int panel = 0;
  for (; panel + MOST_VECTORS <= num_panels; panel += MOST_VECTORS) {
    score_tile<ROWS, MOST_VECTORS>(queries, dim, panels + (int64_t)panel * dim * WIDTH, scores + panel * WIDTH, scores_stride);
  }
  const float* rest = panels + (int64_t)panel * dim * WIDTH;
  float* to = scores + panel * WIDTH;
  if (MOST_VECTORS > 2 && num_panels - panel == 3) score_tile<ROWS, MOST_VECTORS - 1>(queries, dim, rest, to, scores_stride);
  if (MOST_VECTORS > 2 && num_panels - panel == 2) score_tile<ROWS, 2>(queries, dim, rest, to, scores_stride);
  if (num_panels - panel == 1) score_tile<ROWS, 1>(queries, dim, rest, to, scores_stride);
}

// The same scores from WIDTH keys as the cache has them, for one tile of rows: a square of keys and channels is turned in
// registers and used at once. Shuffles and sums overlap, and nothing is packed.
template <int ROWS, typename T>
HEADRACE_INLINE void score_panel(const float* queries, int dim, const T* keys, int count, float* scores, int scores_stride,
                                 Ahead& ahead) {
  constexpr int LINES = (int)(WIDTH * WIDTH * sizeof(T) + 63) / 64;
  Vec sums[ROWS] = {};
  int channel = 0;
  for (; channel + WIDTH <= dim; channel += WIDTH) {
    Vec square[WIDTH];
    load_square(keys + channel, dim, count, square);
    ahead.step(LINES);
    transpose(square);
    const float* from = queries + channel;
#pragma GCC unroll 6
    for (int j = 0; j < ROWS; ++j) {
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) sums[j] = fma(splat(from[i]), square[i], sums[j]);
      from += dim;
      __asm__("" : "+r"(from));
    }
  }
  for (; channel < dim; ++channel) {
    Vec column = {};
    for (int i = 0; i < count; ++i) column[i] = load_element(keys + (int64_t)i * dim + channel);
#pragma GCC unroll 6
    for (int j = 0; j < ROWS; ++j) sums[j] = fma(splat(queries[j * dim + channel]), column, sums[j]);
  }
#pragma GCC unroll 6
  for (int j = 0; j < ROWS; ++j) store(scores + j * scores_stride, sums[j]);
}

template <int ROWS, typename T>
void score_unpacked(const float* queries, int dim, const T* keys, int num_keys, float* scores, int scores_stride, Ahead ahead) {
  int first = 0;
  for (; first + WIDTH <= num_keys; first += WIDTH) {
    score_panel<ROWS>(queries, dim, keys + (int64_t)first * dim, WIDTH, scores + first, scores_stride, ahead);
  }
  if (first < num_keys) {
    score_panel<ROWS>(queries, dim, keys + (int64_t)first * dim, num_keys - first, scores + first, scores_stride, ahead);
  }
}

struct RowSum {
  float most;   // the largest score, LOWEST if there is none
  float total;  // sum of 2^(score - most)
};

// Scores first..last-1 become 2^(score - most), those outside of lo..hi-1 become 0. first and last are multiples of
// WIDTH. cap: 0, or what tanh of a score is multiplied with.
inline RowSum soften(float* scores, int first, int last, int lo, int hi, float cap) {
  if (cap != 0.0f) {
    for (int key = first; key < last; key += WIDTH) store(scores + key, tanh_of_log2(load(scores + key)) * splat(cap));
  }
  Vec most = splat(LOWEST);
  for (int key = first; key < last; key += WIDTH) {
    Vec score = load(scores + key);
    if (key < lo || key + WIDTH > hi) {
      const VecI at = lane_numbers() + key;
      score = select((at >= lo) & (at < hi), score, splat(-__builtin_inff()));
      store(scores + key, score);
    }
    most = max(score, most);
  }
  RowSum result{max_of(most), 0.0f};
  const Vec top = splat(result.most);
  Vec total = {};
  for (int key = first; key < last; key += WIDTH) {
    const Vec power = exp2_nonpositive(load(scores + key) - top);
    store(scores + key, power);
    total += power;
  }
  result.total = sum(total);
  return result;
}

// out[row][channel] = sum over keys of weights[row][key] * values[key][channel], for VECTORS vectors of channels.
template <int ROWS, int VECTORS, typename T>
HEADRACE_INLINE void mix_tile(const float* weights, int weights_stride, const T* values, int values_stride, int num_keys,
                              float* out, int out_stride, Ahead ahead) {
  constexpr int LINES = (int)(VECTORS * WIDTH * sizeof(T) + 63) / 64;
  Vec sums[ROWS][VECTORS] = {};
  for (int key = 0; key < num_keys; ++key, values += values_stride) {
    ahead.step(LINES);
    Vec value[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) value[j] = load_elements(values + j * WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vec weight = splat(weights[i * weights_stride + key]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = fma(weight, value[j], sums[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(out + i * out_stride + j * WIDTH, sums[i][j]);
  }
}

// The same for all channels, num_vectors vectors of them.
template <int ROWS, typename T>
void mix_rows(const float* weights, int weights_stride, const T* values, int values_stride, int num_keys, int num_vectors,
              float* out, int out_stride, Ahead ahead) {
  const int num_parts = (num_vectors + MOST_VECTORS - 1) / MOST_VECTORS;
  for (int part = 0, done = 0; part < num_parts; ++part) {
    const int count = (num_vectors - done + num_parts - part - 1) / (num_parts - part);
    const T* from = values + done * WIDTH;
    float* to = out + done * WIDTH;
    if (count == MOST_VECTORS) mix_tile<ROWS, MOST_VECTORS>(weights, weights_stride, from, values_stride, num_keys, to, out_stride, ahead);
    if (MOST_VECTORS > 2 && count == 3) mix_tile<ROWS, MOST_VECTORS - 1>(weights, weights_stride, from, values_stride, num_keys, to, out_stride, ahead);
    if (MOST_VECTORS > 2 && count == 2) mix_tile<ROWS, 2>(weights, weights_stride, from, values_stride, num_keys, to, out_stride, ahead);
    if (count == 1) mix_tile<ROWS, 1>(weights, weights_stride, from, values_stride, num_keys, to, out_stride, ahead);
    done += count;
  }
}

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
