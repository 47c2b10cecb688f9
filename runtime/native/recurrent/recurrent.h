// Recurrences over packed new tokens: what each row's earlier tokens have left behind is a state of a fixed size.
//
// As in attention, the caller packs the new tokens of all rows, and each row lives in a slot. A call reads the row's
// state, or zeros in a row without earlier tokens, and leaves the state after the row's last token. A token's output is
// the same to the bit however its row was cut into calls, whatever rows are beside it, with any number of threads.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "../variant.h"

namespace headrace {

// The rows of a call. ctypes mirrors these structs: append, never reorder.
struct RecurrentRows {
  const int32_t* slot;       // [num_rows], where each row lives; no two rows share a slot
  const int32_t* past_len;   // [num_rows], tokens before this call
  const int32_t* query_len;  // [num_rows], new tokens; 0 for an idle row
  int64_t num_slots;
  int32_t num_rows;
};

// A causal convolution of each channel: out[t] = bias + sum of weight[j] * x[t - width + 1 + j].
//
// Gated, the input has b, c and x of each token in turn, and the result is c * conv(b * x).
struct Convolution {
  const float* x;       // [tokens, size], or [tokens, 3 * size] if gated
  float* out;           // [tokens, size]
  float* state;         // [num_slots, width - 1, size], the inputs (b * x if gated) of the last tokens, oldest first
  const float* weight;  // [width, size]
  const float* bias;    // [size]; null: none
  RecurrentRows rows;
  int64_t size;
  int32_t width;
  int32_t is_gated;
};

constexpr int32_t MAX_CONVOLUTION = 16;

// A linear recurrence. Each value head has a state S [v_dim, k_dim]; value heads that follow each other share a key head.
// For each token
//     S = kept * S;  S += v k^T;  out = S q
// with kept = exp(gate). Or, a gated delta rule (arXiv:2412.06464), with q and k brought to length 1 and q divided by
// sqrt(k_dim),
//     S = kept * S;  S += beta * (v - S k) k^T;  out = S q
// with beta = sigmoid(b) and kept = exp(-exp(a_log) * softplus(a + dt_bias)).
struct Recurrence {
  const float* qkv;      // [tokens, 2 * num_k_heads * k_dim + num_v_heads * v_dim]
  const float* gates;    // [tokens, num_v_heads]; of a delta rule [tokens, 2 * num_v_heads], b before a
  float* out;            // [tokens, num_v_heads * v_dim]
  float* state;          // [num_slots, num_v_heads, v_dim, k_dim]
  const float* a_log;    // [num_v_heads]; null: no delta rule
  const float* dt_bias;  // [num_v_heads]; null: no delta rule
  RecurrentRows rows;
  int32_t num_k_heads;
  int32_t num_v_heads;
  int32_t k_dim;
  int32_t v_dim;
};

constexpr int32_t MAX_KEY = 512;

// What is wrong with the rows of a call, null if nothing.
const char* find_fault(const RecurrentRows& rows);

struct ConvolutionKernels {
  void (*convolve)(const Convolution&, const Parallel&);
};

struct RecurrenceKernels {
  void (*run)(const Recurrence&, const Parallel&);
};

HEADRACE_TABLE(ConvolutionKernels, convolution_kernels)
HEADRACE_TABLE(RecurrenceKernels, recurrence_kernels)

}  // namespace headrace
