// The experts of the largest keys, found by a warp whose lanes have kCount consecutive experts each.
#pragma once

#include "ptx/numbers.cuh"
#include "router/scoring.cuh"

namespace jmm {

template <int kCount, int kTopK, bool kExponentials>
struct BestExperts {
  // What a lane has been given.
  struct Choice {
    int id = 0;
    float number = 0.0f;  // of its key
    float first = 0.0f;   // the number of lane 0's key
    float sum = 0.0f;     // of all lanes' numbers; or of their exponentials, if that is what weights are

    __device__ __forceinline__ void take(int j, uint32_t key, int lane) {
      const float value = number_of(key);
      if (lane == j) number = value;
      if (j == 0) first = value;
      sum += kExponentials ? expf(value - first) : value;
    }
  };

  // Lane j gets the j-th largest key, and its expert. `ids` is room for the bits of all of them.
  __device__ __forceinline__ static Choice find(const uint32_t (&all_keys)[kCount], float* ids, int lane) {
    Choice chosen;
    uint32_t keys[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) keys[i] = all_keys[i];
    __syncwarp();  // the room has been read
    // As if no keys were equal: a lane that has the maximum takes it without asking who else has it.
    bool equal = false;
    if constexpr (kCount <= kMostSorted) {
      int experts[kCount];
      sort(keys, experts, lane);
#pragma unroll kTopK <= 8 ? kTopK : 1
      for (int j = 0; j < kTopK; ++j) {
        const uint32_t most = maximum_of_warp(keys[0]);
        const bool mine = keys[0] == most;
        chosen.take(j, most, lane);
        if (mine) ids[j] = __int_as_float(experts[0]);
        equal |= __popc(__ballot_sync(~0u, mine)) > 1;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          keys[i] = !mine ? keys[i] : i + 1 < kCount ? keys[i + 1] : 0;
          if (i + 1 < kCount) experts[i] = mine ? experts[i + 1] : experts[i];
        }
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kTopK; ++j) {
        const BestOfLane best(keys);
        const uint32_t most = maximum_of_warp(best.key);
        const bool mine = best.key == most;
        chosen.take(j, most, lane);
        clear(keys, best.at, mine);
        if (mine) ids[j] = __int_as_float(lane * kCount + best.at);
        equal |= __popc(__ballot_sync(~0u, mine)) > 1;
      }
    }
    __syncwarp();
    if (!equal) {
      chosen.id = __float_as_int(ids[min(lane, kTopK - 1)]);
      return chosen;
    }
    chosen = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) keys[i] = all_keys[i];
#pragma unroll 1
    for (int j = 0; j < kTopK; ++j) {
      const BestOfLane best(keys);
      const uint32_t most = maximum_of_warp(best.key);
      const int owner = __ffs(__ballot_sync(~0u, best.key == most)) - 1;
      chosen.take(j, most, lane);
      clear(keys, best.at, lane == owner);
      const int expert = __shfl_sync(~0u, lane * kCount + best.at, owner);
      if (lane == j) chosen.id = expert;
    }
    return chosen;
  }

 private:
  // The largest of a lane's keys, and which one it is: the lower one where keys are equal.
  struct BestOfLane {
    uint32_t key;
    int at;

    __device__ __forceinline__ explicit BestOfLane(const uint32_t (&keys)[kCount]) {
      uint32_t best[kCount];
      int number[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) best[i] = keys[i], number[i] = i;
      // Pairs, pairs of pairs, and so on.
#pragma unroll
      for (int distance = 1; distance < kCount; distance *= 2)
#pragma unroll
        for (int i = 0; i + distance < kCount; i += 2 * distance) {
          if (best[i + distance] > best[i]) best[i] = best[i + distance], number[i] = number[i + distance];
        }
      key = best[0], at = number[0];
    }
  };

  __device__ __forceinline__ static void clear(uint32_t (&keys)[kCount], int at, bool really) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (really && i == at) keys[i] = 0;
    }
  }

  static constexpr int kMostSorted = 4;  // experts of a lane: their number of exchanges is quadratic

  // The keys of a lane, largest first, and whose they are. Neighbours change places: of equal keys the lower expert
  // stays first.
  __device__ __forceinline__ static void sort(uint32_t (&keys)[kCount], int (&experts)[kCount], int lane) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) experts[i] = lane * kCount + i;
#pragma unroll
    for (int end = kCount - 1; end > 0; --end)
#pragma unroll
      for (int i = 0; i < end; ++i) {
        const bool swaps = keys[i + 1] > keys[i];
        const uint32_t key = keys[i];
        const int expert = experts[i];
        keys[i] = swaps ? keys[i + 1] : key, keys[i + 1] = swaps ? key : keys[i + 1];
        experts[i] = swaps ? experts[i + 1] : expert, experts[i + 1] = swaps ? expert : experts[i + 1];
      }
  }
};

}  // namespace jmm
