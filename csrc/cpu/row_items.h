// How the rows of a call become work items: each is a group of rows of one expert times a range of its outputs.
#ifndef JAX_MARLIN_MOE_CPU_ROW_ITEMS_H_
#define JAX_MARLIN_MOE_CPU_ROW_ITEMS_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "cpu/align.h"
#include "cpu/phases.h"

namespace jax_marlin_moe::cpu {

// A phase that calls `item(group, first, last)` for ranges [first, last) of the `pieces` into which the outputs of
// every group of `rows` fall; `rows` has to outlive it. Items small enough keep every thread busy to the end of a
// phase; larger ones, of up to `most` pieces, expand x less often.
inline Phase RowPhase(const RowGroups& rows, int64_t pieces, int64_t most, int64_t threads,
                      std::function<void(const RowGroup& group, int64_t first, int64_t last)> item) {
  const int64_t groups = static_cast<int64_t>(rows.groups.size());
  const int64_t size = std::clamp<int64_t>(groups * pieces / (8 * threads), 1, most);
  const int64_t splits = CeilDiv(pieces, size);
  return {groups * splits, [&rows, pieces, size, splits, item = std::move(item)](int64_t i) {
            const int64_t first = i % splits * size;
            item(rows.groups[static_cast<size_t>(i / splits)], first, std::min(first + size, pieces));
          }};
}

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_ROW_ITEMS_H_
