// Sums over the lanes of a warp, and which of them are equal.
#pragma once

#include "types.cuh"

namespace jmm {

// Of this lane's value and those of the lanes below it; every lane takes part.
__device__ __forceinline__ int inclusive_sum_of_warp(int value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(~0u, value, distance);
    if (threadIdx.x % 32 >= distance) value += below;
  }
  return value;
}

// The lanes whose number, from -1 to kMost - 1, is the same, bit by bit: match.any takes a turn for every different
// one.
template <int kMost>
__device__ __forceinline__ uint32_t lanes_of_equal(int number) {
  uint32_t lanes = ~0u;
#pragma unroll
  for (int bit = 1; bit <= kMost; bit *= 2) {  // -1 differs from all others
    const uint32_t set = __ballot_sync(~0u, number & bit);
    lanes &= number & bit ? set : ~set;
  }
  return lanes;
}

}  // namespace jmm
