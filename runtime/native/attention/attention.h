// Causal attention over packed new tokens and the cached tokens of their rows.
//
// The caller packs the new tokens of all rows, and each row lives in a slot of the cache. A call writes the new keys
// and values into the cache, rounded to the cache's type, and attends to what the cache then holds. A token's output is
// the same to the bit however its row was cut into calls, whatever rows are beside it, with any number of threads.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "../variant.h"

namespace headrace {

enum CacheType : int32_t { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1, CACHE_INT8 = 2 };

// Sizes are in elements. A pointer that may be null says so. ctypes mirrors this struct: append, never reorder.
struct AttentionCall {
  const float* qkv;            // [tokens, (num_heads + 2 * num_kv_heads) * head_dim], rows one after the other
  float* out;                  // [tokens, num_heads * head_dim]
  void* key_cache;             // [num_slots, num_kv_heads, capacity, head_dim] of cache_type
  void* value_cache;           // the same
  const int32_t* slot;         // [num_rows], where each row lives; no two rows share a slot
  const int32_t* past_len;     // [num_rows], tokens in the cache before this call
  const int32_t* query_len;    // [num_rows], new tokens; 0 for an idle row
  const float* cos;            // [max_len, rotary_dim / 2]; null: no rotary embedding
  const float* sin;
  const float* q_norm;         // [head_dim], weight of an RMS norm over each query head; null: none
  const float* k_norm;
  const float* k_scale;        // [num_kv_heads * head_dim], what one step of an int8 cache is worth; null otherwise
  const float* v_scale;
  int64_t num_slots;
  int64_t capacity;
  int32_t num_rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;          // channels of a head that rotate, the first ones; even
  int32_t is_interleaved;      // channels 2i and 2i + 1 are a pair; otherwise i and i + rotary_dim / 2
  int32_t window;              // tokens that a token sees, itself included; 0: all before it
  int32_t cache_type;
  float scale;                 // of the scores
  float softcap;               // scores become softcap * tanh(score / softcap); 0: they stay
  float epsilon;               // of the norms
  const float* sinks;          // [num_heads], scores that take a share of the softmax and add no value; null: none
};

// What is wrong with a call, null if nothing. It reads sizes and the small arrays of the rows.
const char* find_fault(const AttentionCall& call);

struct AttentionKernels {
  // False: there is no memory. The call must have no fault.
  bool (*attend)(const AttentionCall&, const Parallel&);
};

HEADRACE_TABLE(AttentionKernels, attention_kernels)

}  // namespace headrace
