// Token tiles of few slots, which every CTA groups for itself.
#pragma once

#include "ptx/numbers.cuh"
#include "scan.cuh"
#include "token_tiles/expert_of_slot.cuh"

namespace jmm {

constexpr int kMostGroupedSlots = 512;  // and those of shared experts

// Slots grouped by expert with no kernel before. Experts ascend, and so do the slots of each, so that an expert's token
// tiles follow each other.
//
// `Reader` makes a table of all slots, the same in every CTA. A warp knows 32 slots at a time, a word of them: which
// lanes have equal experts, and so how many slots of its expert in the word are before its own. A byte for each expert
// and word counts those; the bytes of an expert are summed up to a word, and experts are summed up to an expert.
//
// `WarpReader` counts the slots of each expert, and where its token tiles begin. The slots of a tile are looked for
// among all of them when a warp asks for it, so that a tile's weights are known before them, and at little cost.
template <class Facts>
struct GroupedTiles {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kRoutedExperts = Facts::kRoutedExperts;  // that topk_ids may name
  static constexpr int kRows = Facts::kRows;                    // of a token tile
  static constexpr bool kMapped = Facts::kMapped;               // whether there is an expert_map
  static constexpr bool kMayRepeat = false, kTaken = false;

  const int32_t* __restrict__ topk_ids;    // [kSlots]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped

  static_assert(kSlots - Facts::kSharedSlots <= kMostGroupedSlots && kSlots <= 1 << 15, "a slot is 16 bits");
  static_assert(kExperts <= 1 << 16, "an expert is 16 bits");
  static constexpr int kMaxTiles = kSlots < kExperts + kSlots / kRows ? kSlots : kExperts + kSlots / kRows;
  static constexpr int kWords = (kSlots + 31) / 32;  // of 32 slots
  static constexpr int kFours = (kWords + 3) / 4;    // of words, whose bytes are counted together
  static constexpr int kMostWarps = 32;              // of a CTA

  struct Table {
    uint2 tiles[(kMaxTiles + 1) / 2 * 2];  // the expert and, in the upper half, how many rows; the first of its slots
    uint16_t slots[(kSlots + 7) / 8 * 8];
  };
  struct Scratch {
    uint32_t counts[kExperts][kFours];  // bytes: slots of the expert in a word
    uint32_t sums[kMostWarps];          // of the experts of a warp: slots, and token tiles in the upper half
    uint16_t firsts[kExperts];          // of an expert's slots in the table
  };

  // Of `WarpReader`: a lane has experts that follow each other.
  static constexpr int kLaneExperts = (kExperts + 31) / 32;
  struct Counts {
    int slots[kLaneExperts * 32];  // of an expert
  };
  template <int kWarps>
  struct FirstTiles {
    uint16_t firsts[kLaneExperts * 32];  // of an expert: how many token tiles come before its own
    uint16_t rows[kWarps][kRows];        // slots of the token tile that a warp has asked for
  };

  static constexpr bool kNeedsPreviousKernel = Facts::kFromPreviousKernel;  // whether it writes topk_ids
  static constexpr int kSharedBytes = sizeof(Table), kScratchBytes = (sizeof(Scratch) + 15) / 16 * 16;

  // Whether a `WarpReader` has room where a `Reader` has.
  template <int kThreads>
  static constexpr bool kFitsWarps =
      kLaneExperts <= 32 && kRows <= 32 && sizeof(FirstTiles<kThreads / 32>) <= kSharedBytes &&
      sizeof(Counts) <= kScratchBytes;

  template <int kThreads>
  struct Reader {
    const Table& table;
    int tiles = 0;

    __device__ __forceinline__ Reader(const GroupedTiles& slots, unsigned char* shared, unsigned char* lent)
        : table(*reinterpret_cast<Table*>(shared)) {
      constexpr int kWarps = kThreads / 32, kWordsOfWarp = (kWords + kWarps - 1) / kWarps;
      constexpr int kExpertsOfThread = (kExperts + kThreads - 1) / kThreads;
      static_assert(kThreads % 32 == 0 && kWarps <= kMostWarps, "whole warps");
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      Table& made = *reinterpret_cast<Table*>(shared);
      Scratch& scratch = *reinterpret_cast<Scratch*>(lent);

      int experts[kWordsOfWarp], ranks[kWordsOfWarp];
#pragma unroll
      for (int i = 0; i < kWordsOfWarp; ++i) {
        const int slot = (i * kWarps + warp) * 32 + lane;
        experts[i] = -1;
        if (slot < kSlots) {
          experts[i] = expert_of_slot<kExperts, kRoutedExperts, kMapped>(slots.topk_ids, slots.expert_map, slot);
        }
      }
#pragma unroll
      for (int i = 0; i < (kExperts * kFours + kThreads - 1) / kThreads; ++i) {
        const int at = i * kThreads + threadIdx.x;
        if (at < kExperts * kFours) scratch.counts[0][at] = 0;
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kWordsOfWarp; ++i) {
        const uint32_t peers = lanes_of_equal<kExperts>(experts[i]);
        ranks[i] = __popc(peers & ((1u << lane) - 1));
        if (experts[i] >= 0 && ranks[i] == 0) {
          reinterpret_cast<unsigned char*>(scratch.counts[experts[i]])[i * kWarps + warp] = __popc(peers);
        }
      }
      __syncthreads();

      // Slots and token tiles of this thread's experts, and of all before them.
      uint32_t sum = 0, counts[kExpertsOfThread];
#pragma unroll
      for (int i = 0; i < kExpertsOfThread; ++i) {
        const int e = threadIdx.x * kExpertsOfThread + i;
        counts[i] = e < kExperts ? count_before(scratch.counts[e], kWords) : 0;
        sum += counts[i] | tiles_of(counts[i]) << 16;
      }
      const uint32_t end_of_thread = inclusive_sum_of_warp(sum);
      if (lane == 31) scratch.sums[warp] = end_of_thread;
      __syncthreads();
      uint32_t start = end_of_thread - sum, end = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const uint32_t of_warp = scratch.sums[w];
        if (w < warp) start += of_warp;
        end += of_warp;
      }
      tiles = end >> 16;
#pragma unroll
      for (int i = 0; i < kExpertsOfThread; ++i) {
        const int e = threadIdx.x * kExpertsOfThread + i;
        if (e < kExperts) scratch.firsts[e] = start;
        for (int row = 0; row < int(counts[i]); row += kRows) {
          made.tiles[(start >> 16) + row / kRows] = {uint32_t(e | min(kRows, int(counts[i]) - row) << 16),
                                                     (start & 0xFFFF) + row};
        }
        start += counts[i] | tiles_of(counts[i]) << 16;
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kWordsOfWarp; ++i) {
        if (experts[i] < 0) continue;
        const int word = i * kWarps + warp;
        const int place = scratch.firsts[experts[i]] + count_before(scratch.counts[experts[i]], word) + ranks[i];
        made.slots[place] = word * 32 + lane;
      }
      __syncthreads();
    }

    __device__ __forceinline__ int count() const { return tiles; }
    __device__ __forceinline__ int expert(int tile) const { return table.tiles[tile].x & 0xFFFF; }
    __device__ __forceinline__ int slot(int tile, int row) const {
      const uint2 one = table.tiles[tile];
      return row < (one.x >> 16) ? table.slots[one.y + row] : -1;
    }
    __device__ __forceinline__ int shift(int) const { return 0; }

   private:
    __device__ __forceinline__ static uint32_t tiles_of(uint32_t rows) { return (rows + kRows - 1) / kRows; }
    // Slots of an expert in the words before one.
    __device__ __forceinline__ static uint32_t count_before(const uint32_t (&counts)[kFours], int word) {
      uint32_t count = 0;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const int bytes = word - 4 * i;
        const uint32_t kept = bytes >= 4 ? counts[i] : bytes > 0 ? counts[i] & ((1u << 8 * bytes) - 1) : 0;
        count = sum_of_bytes(kept, count);
      }
      return count;
    }
  };

  // All lanes of a warp ask together, for the same token tile.
  template <int kThreads>
  struct WarpReader {
    using Made = FirstTiles<kThreads / 32>;
    const GroupedTiles& slots;
    Made& made;
    int tiles = 0;

    __device__ __forceinline__ WarpReader(const GroupedTiles& s, unsigned char* shared, unsigned char* lent)
        : slots(s), made(*reinterpret_cast<Made*>(shared)) {
      static_assert(kThreads % 32 == 0 && kFitsWarps<kThreads>, "whole warps, and room for what they share");
      constexpr int kSlotsOfThread = (kSlots + kThreads - 1) / kThreads;
      const int lane = threadIdx.x % 32;
      Counts& counts = *reinterpret_cast<Counts*>(lent);

      int experts[kSlotsOfThread];
#pragma unroll
      for (int i = 0; i < kSlotsOfThread; ++i) experts[i] = expert_of(i * kThreads + threadIdx.x);
#pragma unroll
      for (int e = threadIdx.x; e < kLaneExperts * 32; e += kThreads) counts.slots[e] = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSlotsOfThread; ++i) {
        if (experts[i] >= 0) atomicAdd(&counts.slots[experts[i]], 1);
      }
      __syncthreads();

      // Every warp adds up the token tiles; the first one notes where those of each expert begin.
      int own[kLaneExperts], sum = 0;
#pragma unroll
      for (int i = 0; i < kLaneExperts; ++i) {
        own[i] = (counts.slots[lane * kLaneExperts + i] + kRows - 1) / kRows;
        sum += own[i];
      }
      const int end = inclusive_sum_of_warp(sum);
      tiles = __shfl_sync(~0u, end, 31);
      if (threadIdx.x < 32) {
        int first = end - sum;
#pragma unroll
        for (int i = 0; i < kLaneExperts; ++i) {
          made.firsts[lane * kLaneExperts + i] = first;
          first += own[i];
        }
      }
      __syncthreads();
    }

    __device__ __forceinline__ int count() const { return tiles; }

    // The last expert whose token tiles do not begin behind this one: one that has none begins where the next one does.
    __device__ __forceinline__ int expert(int tile) const {
      const int lane = threadIdx.x % 32;
      const int owner = last_of(made.firsts[lane * kLaneExperts] <= tile);
      if constexpr (kLaneExperts == 1) return owner;
      const bool begins = lane < kLaneExperts && made.firsts[owner * kLaneExperts + lane % kLaneExperts] <= tile;
      return owner * kLaneExperts + last_of(begins);
    }

    // The slot of row `lane` of a token tile.
    __device__ __forceinline__ int slot(int tile, int lane) const {
      const int e = expert(tile);
      uint16_t (&rows)[kRows] = made.rows[threadIdx.x / 32];
      int experts[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) experts[w] = expert_of(w * 32 + lane);
      int row = (made.firsts[e] - tile) * kRows;  // of the next slot that is found; negative in tiles before this one
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t found = __ballot_sync(~0u, experts[w] == e);
        const uint32_t own = row + __popc(found & ((1u << lane) - 1));
        if (experts[w] == e && own < kRows) rows[own] = w * 32 + lane;
        row += __popc(found);
      }
      __syncwarp();
      const int slot = lane < min(row, kRows) ? rows[lane] : -1;
      __syncwarp();  // before the warp asks for another one
      return slot;
    }

    __device__ __forceinline__ int shift(int) const { return 0; }

   private:
    __device__ __forceinline__ int expert_of(int slot) const {
      if (slot >= kSlots) return -1;
      return expert_of_slot<kExperts, kRoutedExperts, kMapped>(slots.topk_ids, slots.expert_map, slot);
    }
    __device__ __forceinline__ static int last_of(bool lane_has) { return 31 - __clz(__ballot_sync(~0u, lane_has)); }
  };
};

// How the warps of a CTA read token tiles. kTogether: all lanes of a warp ask at once, for one tile.
template <class TokenTiles, int kThreads>
struct WarpsRead {
  static constexpr bool kTogether = false;
  using Reader = typename TokenTiles::template Reader<kThreads>;
};
template <class Facts, int kThreads>
  requires(GroupedTiles<Facts>::template kFitsWarps<kThreads>)
struct WarpsRead<GroupedTiles<Facts>, kThreads> {
  static constexpr bool kTogether = true;
  using Reader = typename GroupedTiles<Facts>::template WarpReader<kThreads>;
};

}  // namespace jmm
