// Token tiles of rows that are all of one expert.
#pragma once

#include "types.cuh"

namespace jmm {

// All rows are of one expert, which memory may name; a number out of range is that of the nearest.
template <class Facts>
struct OneExpertTiles {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kRows = Facts::kRows;     // of a token tile
  static constexpr bool kNamed = Facts::kNamed;  // whether there is an expert to read; else it is the first
  static constexpr bool kMayRepeat = false, kTaken = false;
  static constexpr int kMaxTiles = (kSlots + kRows - 1) / kRows;

  const int32_t* __restrict__ named;  // [1] if kNamed

  static constexpr bool kNeedsPreviousKernel = false;
  static constexpr int kSharedBytes = 0, kScratchBytes = 0;

  template <int kThreads>
  struct Reader {
    int one = 0;

    __device__ __forceinline__ Reader(const OneExpertTiles& rows, unsigned char*, unsigned char*) {
      if constexpr (kNamed) one = min(max(*rows.named, 0), kExperts - 1);
    }
    __device__ __forceinline__ int count() const { return kMaxTiles; }
    __device__ __forceinline__ int expert(int) const { return one; }
    __device__ __forceinline__ int slot(int tile, int row) const {
      const int s = tile * kRows + row;
      return s < kSlots ? s : -1;
    }
    __device__ __forceinline__ int shift(int) const { return 0; }
  };
};

}  // namespace jmm
