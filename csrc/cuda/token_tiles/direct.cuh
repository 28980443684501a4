// Token tiles of one slot each.
#pragma once

#include "token_tiles/expert_of_slot.cuh"

namespace jmm {

// Every slot is a token tile of one row: nothing to group, at the price of reading an expert once per slot.
template <class Facts>
struct DirectTiles {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kRoutedExperts = Facts::kRoutedExperts;  // that topk_ids may name
  static constexpr bool kMapped = Facts::kMapped;               // whether there is an expert_map
  static constexpr bool kMayRepeat = false, kTaken = false;
  static constexpr int kRows = 1, kMaxTiles = kSlots;

  const int32_t* __restrict__ topk_ids;    // [kSlots]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped

  static constexpr bool kNeedsPreviousKernel = Facts::kFromPreviousKernel;  // whether it writes topk_ids
  static constexpr int kSharedBytes = 0, kScratchBytes = 0;

  template <int kThreads>
  struct Reader {
    const DirectTiles& slots;

    __device__ __forceinline__ Reader(const DirectTiles& r, unsigned char*, unsigned char*) : slots(r) {}
    __device__ __forceinline__ int count() const { return kSlots; }
    __device__ __forceinline__ int expert(int tile) const {
      return expert_of_slot<kExperts, kRoutedExperts, kMapped>(slots.topk_ids, slots.expert_map, tile);
    }
    __device__ __forceinline__ int slot(int tile, int row) const { return row == 0 ? tile : -1; }
    __device__ __forceinline__ int shift(int) const { return 0; }
  };
};

}  // namespace jmm
