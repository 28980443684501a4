// The expert of a slot, from the ids themselves.
#pragma once

#include "types.cuh"

namespace jmm {

// The expert of a slot among this matrix's, -1 where the slot vanishes.
template <int kExperts, int kRoutedExperts, bool kMapped>
__device__ __forceinline__ int expert_of_slot(const int32_t* topk_ids, const int32_t* expert_map, int slot) {
  int e = topk_ids[slot];
  if (e < 0 || e >= kRoutedExperts) return -1;
  if constexpr (kMapped) e = expert_map[e];
  return e >= 0 && e < kExperts ? e : -1;
}

}  // namespace jmm
