// The groups of experts that stay in the choice: those of the largest worth.
#pragma once

#include "router/scoring.cuh"

namespace jmm {

// A warp has the experts, each lane kCount of them. kTop2: a group is worth its best two, or its best.
template <int kCount, int kExperts, int kGroups, int kTopGroups, bool kTop2>
struct BestGroups {
  static constexpr int kSize = kExperts / kGroups;
  static constexpr int kLanes = kSize % kCount == 0 ? kSize / kCount : 0;
  // Whether a group is what some neighbouring lanes have, a power of two of them.
  static constexpr bool kOfLanes = kLanes > 0 && (kLanes & (kLanes - 1)) == 0;

  // Whether a group is one of the kTopGroups of the largest worth: this lane's if kOfLanes, from all lanes'
  // values; else the one of the lane's number, from a row of them.
  __device__ __forceinline__ static bool keep(const float* choice, const float (&values)[kCount],
                                              const uint32_t (&keys)[kCount], int lane) {
    BestTwo best;
    if constexpr (kOfLanes) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) best.take(keys[i], values[i]);
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        const uint32_t first_key = __shfl_xor_sync(~0u, best.first_key, distance);
        const uint32_t second_key = __shfl_xor_sync(~0u, best.second_key, distance);
        const float first = __shfl_xor_sync(~0u, best.first, distance);
        const float second = __shfl_xor_sync(~0u, best.second, distance);
        best.take(first_key, first);
        best.take(second_key, second);
      }
    } else if (lane < kGroups) {
#pragma unroll 8
      for (int i = 0; i < kSize; ++i) {
        const float value = choice[lane * kSize + i];
        best.take(order_of(value), value);
      }
    }
    const float worth = kTop2 && kSize > 1 ? best.first + best.second : best.first;
    const int group = kOfLanes ? lane / kLanes : lane;  // that this lane knows
    const uint32_t mine = order_of(worth);
    int better = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t theirs = __shfl_sync(~0u, mine, kOfLanes ? g * kLanes : g);
      better += theirs > mine || (theirs == mine && g < group);
    }
    return group < kGroups && better < kTopGroups;
  }

 private:
  // The best two of a group: their keys, and the numbers.
  struct BestTwo {
    uint32_t first_key = 0, second_key = 0;
    float first = 0.0f, second = 0.0f;

    __device__ __forceinline__ void take(uint32_t k, float value) {
      const bool leads = k > first_key, follows = k > second_key;
      second = leads ? first : follows ? value : second;
      second_key = leads ? first_key : follows ? k : second_key;
      first = leads ? value : first;
      first_key = leads ? k : first_key;
    }
  };
};

}  // namespace jmm
