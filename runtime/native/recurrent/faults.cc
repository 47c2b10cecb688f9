// Checks of a call that the kernels rely on.
#include "recurrent.h"

namespace headrace {

const char* find_fault(const RecurrentRows& rows) {
  for (int32_t row = 0; row < rows.num_rows; ++row) {
    if (rows.query_len[row] < 0 || rows.past_len[row] < 0) return "a length is negative";
    if (rows.query_len[row] == 0) continue;
    if (rows.slot[row] < 0 || rows.slot[row] >= rows.num_slots) return "a row's slot is outside of the states";
  }
  return nullptr;
}

}  // namespace headrace
