// Checks of a call that the kernels rely on.
#include "attention.h"

namespace headrace {

const char* find_fault(const AttentionCall& call) {
  if (call.head_dim <= 0 || call.num_kv_heads <= 0 || call.num_heads % call.num_kv_heads != 0 || call.num_heads <= 0) {
    return "num_heads is no multiple of kv_num_heads";
  }
  if (call.cache_type < CACHE_FLOAT32 || call.cache_type > CACHE_INT8) return "the cache is neither float32, float16 nor int8";
  if ((call.cache_type == CACHE_INT8) != (call.k_scale != nullptr && call.v_scale != nullptr)) {
    return "an int8 cache needs both scales, and no other has any";
  }
  if ((call.cos == nullptr) != (call.sin == nullptr)) return "cos and sin belong together";
  if (call.cos && (call.rotary_dim < 0 || call.rotary_dim % 2 != 0 || call.rotary_dim > call.head_dim)) {
    return "the rotary tables are wider than a head";
  }
  if (call.window < 0 || !(call.softcap >= 0.0f)) return "window and softcap are not negative";
  for (int32_t row = 0; row < call.num_rows; ++row) {
    if (call.query_len[row] < 0 || call.past_len[row] < 0) return "a length is negative";
    if (call.query_len[row] == 0) continue;
    if (call.slot[row] < 0 || call.slot[row] >= call.num_slots) return "a row's slot is outside of the cache";
    if ((int64_t)call.past_len[row] + call.query_len[row] > call.capacity) return "a row is longer than the cache";
  }
  return nullptr;
}

}  // namespace headrace
