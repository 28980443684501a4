// moe_align_block_size in one CTA: slots grouped by expert, ascending inside an expert, always.
//
// Two passes over the slots, each warp over a contiguous part of them: count per (warp, expert), then place. The
// order needs no atomics: a slot's position is the expert's start, plus the counts of earlier warps, plus its rank
// among equal ids of its own warp.
#pragma once

#include "ptx/ptx.cuh"
#include "scan.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/align.py.
template <class Facts>
struct AlignBlockSize {
  static constexpr int kSlots = Facts::kSlots;            // of topk_ids
  static constexpr int kExperts = Facts::kExperts;        // that topk_ids may name
  static constexpr int kBlock = Facts::kBlock;            // entries of a list block
  static constexpr int kListLength = Facts::kListLength;  // room for entries, whole list blocks
  static constexpr int kWarps = Facts::kWarps, kThreads = 32 * kWarps, kMaxCtas = 1;
  static constexpr bool kMapped = Facts::kMapped;  // whether there is an expert_map
  static constexpr int kBlocks = (kListLength + kBlock - 1) / kBlock;
  static constexpr int kSlotsPerWarp = (kSlots + kThreads - 1) / kThreads * 32;

  static constexpr int kAhead = kSlotsPerWarp / 32 < 8 ? kSlotsPerWarp / 32 : 8;  // ids of a lane fetched at once

  struct Shared {
    int counts[kWarps][kExperts];  // then: where the warp's next slot of the expert goes
    int warp_sums[kWarps];
    int ends[kExperts];  // end of each expert's padded part of the list
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  const int32_t* __restrict__ topk_ids;          // [kSlots]
  const int32_t* __restrict__ expert_map;        // [kExperts] if kMapped
  int32_t* __restrict__ sorted_token_ids;        // [kListLength]
  int32_t* __restrict__ expert_ids;              // [kBlocks]
  int32_t* __restrict__ num_tokens_post_padded;  // [1]

  __device__ void run(unsigned char* shared_bytes) const {
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = warp * kSlotsPerWarp, last = min(first + kSlotsPerWarp, kSlots);

    for (int i = threadIdx.x; i < kWarps * kExperts; i += kThreads) shared.counts[0][i] = 0;
    wait_for_previous_kernel();
    allow_next_kernel();
    for (int i = threadIdx.x; i < kListLength; i += kThreads) sorted_token_ids[i] = kSlots;
    __syncthreads();

    for (int base = first; base < last; base += 32 * kAhead) {
      int experts[kAhead];
      fetch(experts, base + lane, last);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (experts[i] >= 0) atomicAdd(&shared.counts[warp][experts[i]], 1);
      }
    }
    __syncthreads();

    int end = 0;  // of the padded list so far
    for (int base = 0; base < kExperts; base += kThreads) {
      const int e = base + threadIdx.x;
      int total = 0;
      if (e < kExperts) {
        for (int w = 0; w < kWarps; ++w) total += shared.counts[w][e];
      }
      const int padded = (total + kBlock - 1) / kBlock * kBlock;
      const int inclusive = end + inclusive_sum(shared, padded);
      if (e < kExperts) {
        shared.ends[e] = inclusive;
        int position = inclusive - padded;
        for (int w = 0; w < kWarps; ++w) {
          const int count = shared.counts[w][e];
          shared.counts[w][e] = position;
          position += count;
        }
      }
      __syncthreads();
      end = shared.ends[min(base + kThreads, kExperts) - 1];
    }
    if (threadIdx.x == 0) *num_tokens_post_padded = end;

    for (int block = threadIdx.x; block < kBlocks; block += kThreads) {
      const int position = block * kBlock;
      int e = -1;
      if (position < end) {
        int low = 0, high = kExperts - 1;  // the first expert whose part ends past `position`
        while (low < high) {
          const int middle = (low + high) / 2;
          if (shared.ends[middle] > position)
            high = middle;
          else
            low = middle + 1;
        }
        e = kMapped ? expert_map[low] : low;
      }
      expert_ids[block] = e;
    }

    for (int base = first; base < last; base += 32 * kAhead) {
      int experts[kAhead];
      fetch(experts, base + lane, last);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int e = experts[i];
        const uint32_t peers = lanes_of_equal(e);
        const int rank = __popc(peers & ((1u << lane) - 1));
        const int start = e >= 0 ? shared.counts[warp][e] : 0;
        __syncwarp();
        if (e >= 0) {
          sorted_token_ids[start + rank] = base + 32 * i + lane;
          if (lane == leader(peers)) shared.counts[warp][e] = start + __popc(peers);
        }
        __syncwarp();
      }
    }
  }

 private:
  // The experts of slots 32 apart.
  __device__ __forceinline__ void fetch(int (&experts)[kAhead], int slot, int last) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) experts[i] = kept_expert(slot + 32 * i, last);
  }

  // The global id of the slot's expert, -1 where the slot vanishes.
  __device__ __forceinline__ int kept_expert(int slot, int last) const {
    if (slot >= last) return -1;
    const int e = topk_ids[slot];
    if (e < 0 || e >= kExperts) return -1;
    if constexpr (kMapped) {
      if (expert_map[e] < 0) return -1;
    }
    return e;
  }

  // The lanes whose expert is the same, bit by bit: match.any takes a turn for every different value.
  __device__ __forceinline__ static uint32_t lanes_of_equal(int expert) {
    uint32_t lanes = ~0u;
#pragma unroll
    for (int bit = 1; bit <= kExperts; bit *= 2) {  // -1 differs from every expert
      const uint32_t set = __ballot_sync(~0u, expert & bit);
      lanes &= expert & bit ? set : ~set;
    }
    return lanes;
  }

  __device__ __forceinline__ static int leader(uint32_t peers) { return __ffs(peers) - 1; }

  // Over the threads of the CTA; every thread takes part.
  __device__ static int inclusive_sum(Shared& shared, int value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = inclusive_sum_of_warp(value);
    __syncthreads();  // sums of an earlier call have been read
    if (lane == 31) shared.warp_sums[warp] = value;
    __syncthreads();
    for (int w = 0; w < warp; ++w) value += shared.warp_sums[w];
    return value;
  }
};

}  // namespace jmm
