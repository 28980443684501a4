// Sums over the lanes of a warp.
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

}  // namespace jmm
