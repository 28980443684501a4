// moe_align_block_size: slots grouped by expert, ascending inside an expert, always.
//
// Each warp has a contiguous part of the slots and passes over it twice: count per (warp, expert), then place. The
// order needs no atomics: a slot's position is the expert's start, plus the counts of earlier CTAs and earlier warps,
// plus its rank among equal ids of its own warp. One CTA knows all counts by itself; where there are several, a kernel
// before this one counts what each of them has.
#pragma once

#include "ptx/synchronization.cuh"
#include "scan.cuh"
#include "token_count.cuh"

namespace jmm {

// Facts of both kernels: jax_marlin_moe/cuda/kernels/align.py.

// The slots of each warp, and their experts.
template <class Facts>
struct PartsOfSlots {
  static constexpr int kSlots = Facts::kSlots;      // of topk_ids, or as many at most
  static constexpr int kExperts = Facts::kExperts;  // that topk_ids may name
  static constexpr bool kMapped = Facts::kMapped;   // whether there is an expert_map
  static constexpr int kSlotsOfToken = Facts::kSlotsOfToken;
  static constexpr int kWarps = Facts::kWarps, kThreads = 32 * kWarps, kCtas = Facts::kCtas;
  static constexpr int kSlotsPerWarp = (kSlots + kCtas * kThreads - 1) / (kCtas * kThreads) * 32;
  static constexpr int kAhead = kSlotsPerWarp / 32 < 8 ? kSlotsPerWarp / 32 : 8;  // ids of a lane fetched at once
  static_assert(kCtas * kThreads <= 1 << 15, "slots past the last one are counted in int");

  const int32_t* __restrict__ topk_ids;    // [kSlots]
  const int32_t* __restrict__ expert_map;  // [kExperts] if kMapped
  [[no_unique_address]] TokenCount<Facts::kCounted> count;

  // Calls visit(first slot, this lane's expert) for every 32 slots of this warp; -1 where a slot vanishes.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    const int first = (blockIdx.x * kWarps + threadIdx.x / 32) * kSlotsPerWarp, lane = threadIdx.x % 32;
    const int last = min(first + kSlotsPerWarp, count.of(kSlots / kSlotsOfToken) * kSlotsOfToken);
    for (int base = first; base < last; base += 32 * kAhead) {
      int experts[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) experts[i] = kept_expert(base + 32 * i + lane, last);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) visit(base + 32 * i, experts[i]);
    }
  }

 private:
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
};

// Counts the slots of each CTA of the kernel that follows, and clears the list that it fills.
template <class Facts>
struct CountSlots {
  using Parts = PartsOfSlots<Facts>;
  static constexpr int kSlots = Parts::kSlots, kExperts = Parts::kExperts;
  static constexpr int kThreads = Parts::kThreads, kMaxCtas = Parts::kCtas;
  static constexpr int kListLength = Facts::kListLength;
  static constexpr int kSharedBytes = sizeof(int) * kExperts;

  Parts parts;
  int32_t* __restrict__ sorted_token_ids;  // [kListLength]
  int32_t* __restrict__ counts;            // [kMaxCtas, kExperts]

  __device__ void run(unsigned char* shared_bytes) const {
    int* const found = reinterpret_cast<int*>(shared_bytes);  // [kExperts]
    for (int e = threadIdx.x; e < kExperts; e += kThreads) found[e] = 0;
    wait_for_previous_kernel();
    allow_next_kernel();
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < kListLength; i += kMaxCtas * kThreads) {
      sorted_token_ids[i] = kSlots;
    }
    __syncthreads();
    parts.for_each([&](int, int expert) {
      if (expert >= 0) atomicAdd(&found[expert], 1);
    });
    __syncthreads();
    for (int e = threadIdx.x; e < kExperts; e += kThreads) counts[blockIdx.x * kExperts + e] = found[e];
  }
};

template <class Facts>
struct AlignBlockSize {
  using Parts = PartsOfSlots<Facts>;
  static constexpr int kSlots = Parts::kSlots, kExperts = Parts::kExperts;
  static constexpr int kBlock = Facts::kBlock;            // entries of a list block
  static constexpr int kListLength = Facts::kListLength;  // room for entries, whole list blocks
  static constexpr int kWarps = Parts::kWarps, kThreads = Parts::kThreads, kMaxCtas = Parts::kCtas;
  static constexpr int kBlocks = (kListLength + kBlock - 1) / kBlock;
  static constexpr int kProducts = Facts::kProducts;  // that follow, whose CTAs take work tiles as they come to them

  struct Shared {
    int counts[kWarps][kExperts];  // then: where the warp's next slot of the expert goes
    int warp_sums[kWarps];
    int ends[kExperts];  // end of each expert's padded part of the list
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  Parts parts;
  const int32_t* __restrict__ counts;            // [kMaxCtas, kExperts], what CountSlots found; absent for one CTA
  int32_t* __restrict__ sorted_token_ids;        // [kListLength]
  int32_t* __restrict__ expert_ids;              // [kBlocks]
  int32_t* __restrict__ num_tokens_post_padded;  // [1]
  int32_t* __restrict__ taken;                   // [kProducts], cleared: work tiles that CTAs have taken

  __device__ void run(unsigned char* shared_bytes) const {
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    for (int i = threadIdx.x; i < kWarps * kExperts; i += kThreads) shared.counts[0][i] = 0;
    if constexpr (kMaxCtas == 1) {
      wait_for_previous_kernel();
      allow_next_kernel();
      for (int i = threadIdx.x; i < kListLength; i += kThreads) sorted_token_ids[i] = kSlots;
    }
    __syncthreads();
    // Of several CTAs: CountSlots has let this kernel in once the ids were there.
    parts.for_each([&](int, int expert) {
      if (expert >= 0) atomicAdd(&shared.counts[warp][expert], 1);
    });
    if constexpr (kMaxCtas > 1) {
      wait_for_previous_kernel();
      allow_next_kernel();
    }
    __syncthreads();

    const int end = start_experts(shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *num_tokens_post_padded = end;
#pragma unroll
      for (int p = 0; p < kProducts; ++p) taken[p] = 0;
    }
    name_experts(shared, end);

    parts.for_each([&](int slots, int e) {
      const uint32_t peers = lanes_of_equal<kExperts>(e);
      const int rank = __popc(peers & ((1u << lane) - 1));
      const int start = e >= 0 ? shared.counts[warp][e] : 0;
      __syncwarp();
      if (e >= 0) {
        sorted_token_ids[start + rank] = slots + lane;
        if (lane == leader(peers)) shared.counts[warp][e] = start + __popc(peers);
      }
      __syncwarp();
    });
  }

 private:
  // From counts to starts; returns the end of the padded list.
  __device__ __forceinline__ int start_experts(Shared& shared) const {
    int end = 0;
    for (int base = 0; base < kExperts; base += kThreads) {
      const int e = base + threadIdx.x;
      int total = 0, before = 0;  // the expert's slots, and those of earlier CTAs
      if (e < kExperts) count(shared, e, total, before);
      const int padded = (total + kBlock - 1) / kBlock * kBlock;
      const int inclusive = end + inclusive_sum(shared, padded);
      if (e < kExperts) {
        shared.ends[e] = inclusive;
        int position = inclusive - padded + before;
        for (int w = 0; w < kWarps; ++w) {
          const int count = shared.counts[w][e];
          shared.counts[w][e] = position;
          position += count;
        }
      }
      __syncthreads();
      end = shared.ends[min(base + kThreads, kExperts) - 1];
    }
    return end;
  }

  __device__ __forceinline__ void count(const Shared& shared, int expert, int& total, int& before) const {
    if constexpr (kMaxCtas == 1) {
      for (int w = 0; w < kWarps; ++w) total += shared.counts[w][expert];
    } else {
#pragma unroll 16
      for (int cta = 0; cta < kMaxCtas; ++cta) {
        const int found = counts[cta * kExperts + expert];
        total += found;
        before += cta < int(blockIdx.x) ? found : 0;
      }
    }
  }

  // The expert of each block: the first one whose part ends past the block's start.
  __device__ __forceinline__ void name_experts(const Shared& shared, int end) const {
    for (int block = blockIdx.x * kThreads + threadIdx.x; block < kBlocks; block += kMaxCtas * kThreads) {
      const int position = block * kBlock;
      int e = -1;
      if (position < end) {
        int low = 0, high = kExperts - 1;
        while (low < high) {
          const int middle = (low + high) / 2;
          if (shared.ends[middle] > position)
            high = middle;
          else
            low = middle + 1;
        }
        e = Parts::kMapped ? parts.expert_map[low] : low;
      }
      expert_ids[block] = e;
    }
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
