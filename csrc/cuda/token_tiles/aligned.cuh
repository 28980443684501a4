// Token tiles of an aligned list of slots.
#pragma once

#include "types.cuh"

namespace jmm {

constexpr int kNoRow = 0x7FFFFFFF;  // of a list

// The classic contract: sorted_token_ids in list blocks of kListBlock entries of one expert, taken kRows at a time.
// Values are not trusted. kFromPreviousKernel: the list is written by the kernel before this one, not by an earlier
// one. kMayRepeat: a slot may be listed more than once, and only its first row counts; the kernel before says which one
// it is. kTaken: CTAs take work tiles as they come to them, rather than by turns.
template <class Facts>
struct AlignedTiles {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kRows = Facts::kRows;            // of a token tile
  static constexpr int kListBlock = Facts::kListBlock;  // entries of a list block
  static constexpr int kListLength = Facts::kListLength;
  static constexpr bool kFromPreviousKernel = Facts::kFromPreviousKernel, kMayRepeat = Facts::kMayRepeat;
  static constexpr bool kTaken = Facts::kTaken;
  static constexpr int kMaxTiles = (kListLength + kRows - 1) / kRows;
  static_assert(kListBlock % kRows == 0, "a token tile has one expert");

  const int32_t* __restrict__ sorted_token_ids;        // [kListLength]
  const int32_t* __restrict__ expert_ids;              // [ceil(kListLength / kListBlock)]
  const int32_t* __restrict__ num_tokens_post_padded;  // [1]
  // [kSlots] if kMayRepeat: where the list has each slot first. Not __restrict__: no read may move ahead of the wait.
  const int32_t* first_rows;
  int32_t* taken;  // [1] if kTaken: work tiles that were taken, beside the first one of each CTA

  static constexpr bool kNeedsPreviousKernel = kFromPreviousKernel;
  static constexpr int kSharedBytes = kTaken ? 16 : 0, kScratchBytes = 0;

  template <int kThreads>
  struct Reader {
    const AlignedTiles& list;
    const int listed;        // entries of the list that count
    int* const shared_next;  // [2] if kTaken, for the threads that share the number of a work tile

    __device__ __forceinline__ Reader(const AlignedTiles& r, unsigned char* shared, unsigned char*)
        : list(r),
          listed(min(kListLength, max(0, *r.num_tokens_post_padded))),
          shared_next(reinterpret_cast<int*>(shared)) {}
    // The number of a work tile that no other CTA has, of so many. Each of them is taken or asked behind once, so in
    // the end the count is zero again.
    __device__ __forceinline__ int take(int work_tiles) const {
      return gridDim.x + atomicInc(reinterpret_cast<unsigned*>(list.taken), work_tiles - 1);
    }
    __device__ __forceinline__ int count() const { return (listed + kRows - 1) / kRows; }
    __device__ __forceinline__ int expert(int tile) const {
      const int e = list.expert_ids[tile * kRows / kListBlock];
      // A list that was made for larger token tiles has tiles of nothing but padding.
      if constexpr (kFromPreviousKernel && kListBlock > kRows && !kMayRepeat) {
        if (list.sorted_token_ids[tile * kRows] >= kSlots) return -1;
      }
      return e >= 0 && e < kExperts ? e : -1;
    }
    __device__ __forceinline__ int slot(int tile, int row) const {
      const int position = tile * kRows + row;
      if (position >= listed) return -1;
      const int s = list.sorted_token_ids[position];
      return s >= 0 && s < kSlots ? s : -1;
    }
    __device__ __forceinline__ int shift(int) const { return 0; }
    // -1 where an earlier row of the list has the slot too. Reads what the kernel before wrote.
    __device__ __forceinline__ int first_listed(int slot, int tile, int row) const {
      return slot >= 0 && list.first_rows[slot] == tile * kRows + row ? slot : -1;
    }
  };
};

}  // namespace jmm
