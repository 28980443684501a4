// Which rows a block of tokens has: read off the aligned slot list, or, for few slots, straight off topk_ids.
#pragma once

#include "ptx.cuh"

namespace jmm {

// The classic contract: sorted_token_ids in runs of kListBlock entries of one expert, taken kBlock at a time. Values
// are not trusted. kFromPreviousKernel: the list is written by the kernel before this one, not by an earlier one.
template <int kSlots, int kExperts, int kBlock, int kListBlock, int kListLength, bool kFromPreviousKernel>
struct SortedRouting {
  static_assert(kListBlock % kBlock == 0, "a block has one expert");

  const int32_t* __restrict__ sorted_token_ids;        // [kListLength]
  const int32_t* __restrict__ expert_ids;              // [ceil(kListLength / kListBlock)]
  const int32_t* __restrict__ num_tokens_post_padded;  // [1]

  static constexpr bool kNeedsPreviousKernel = kFromPreviousKernel;
  static constexpr int kMaxBlocks = (kListLength + kBlock - 1) / kBlock;

  // Entries of the list that count; read once.
  __device__ int listed() const { return min(kListLength, max(0, *num_tokens_post_padded)); }
  __device__ static int num_blocks(int listed) { return (listed + kBlock - 1) / kBlock; }
  // -1 where the block has nothing to do.
  __device__ int expert(int block) const {
    int e = expert_ids[block * kBlock / kListBlock];
    return e >= 0 && e < kExperts ? e : -1;
  }
  // -1 where the row is padding.
  __device__ int slot(int block, int row, int listed) const {
    int position = block * kBlock + row;
    if (position >= listed) return -1;
    int s = sorted_token_ids[position];
    return s >= 0 && s < kSlots ? s : -1;
  }
};

// Every slot is a block of one row: no alignment kernel, at the price of reading an expert once per slot.
template <int kSlots, int kExperts, int kRoutedExperts, bool kMapped>
struct DirectRouting {
  const int32_t* __restrict__ topk_ids;    // [kSlots]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped

  static constexpr bool kNeedsPreviousKernel = false;
  static constexpr int kMaxBlocks = kSlots;

  __device__ int listed() const { return kSlots; }
  __device__ static int num_blocks(int listed) { return listed; }
  __device__ int expert(int block) const {
    int e = topk_ids[block];
    if (e < 0 || e >= kRoutedExperts) return -1;
    if constexpr (kMapped) e = expert_map[e];
    return e >= 0 && e < kExperts ? e : -1;
  }
  __device__ int slot(int block, int row, int) const { return row == 0 ? block : -1; }
};

}  // namespace jmm
