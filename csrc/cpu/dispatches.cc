// Entries in their order: a later one takes the rows of an earlier one.
#include "cpu/dispatches.h"

#include <algorithm>

namespace jax_marlin_moe::cpu {

int32_t ResolveDispatches(const Dispatches& dispatches, int32_t* experts, int32_t* rows) {
  std::fill_n(experts, dispatches.result_rows, -1);
  std::fill_n(rows, dispatches.result_rows, 0);
  int32_t out_of_range = 0;
  for (int64_t d = 0; d < dispatches.count; ++d) {
    const int32_t* entry = dispatches.entries + 4 * d;
    const int64_t expert = entry[0], source = entry[1], target = entry[2], count = entry[3];
    const bool in_range = expert >= 0 && expert < dispatches.experts && count >= 0 && source >= 0 &&
                          source <= dispatches.rows - count && target >= 0 && target <= dispatches.result_rows - count;
    if (!in_range) {
      out_of_range += count != 0;
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      experts[target + i] = static_cast<int32_t>(expert);
      rows[target + i] = static_cast<int32_t>(source + i);
    }
  }
  return out_of_range;
}

}  // namespace jax_marlin_moe::cpu
