// Which rows a token tile has: read from the aligned list of slots, directly from topk_ids where hardly two slots share
// an expert, or grouped by every CTA for itself where slots are few (docs/kernels.md, "Which rows a token tile has").
// Rows that follow each other in memory are read from a table of dispatches, or are all of one expert.
//
// Each way has a type `Reader`, made once by all threads of a CTA: how many token tiles there are, the expert of each
// (-1 where it has nothing to do), the slot of each row (-1 where it is padding), and how many rows of x behind that of
// its slot a row reads. Facts: jax_marlin_moe/cuda/kernels/token_tiles.py.
#pragma once

#include "scan.cuh"

namespace jmm {

constexpr int kNoRow = 0x7FFFFFFF;      // of a list
constexpr int kMostGroupedSlots = 512;  // and those of shared experts

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

// The expert of a slot among this matrix's, -1 where the slot vanishes.
template <int kExperts, int kRoutedExperts, bool kMapped>
__device__ __forceinline__ int expert_of_slot(const int32_t* topk_ids, const int32_t* expert_map, int slot) {
  int e = topk_ids[slot];
  if (e < 0 || e >= kRoutedExperts) return -1;
  if constexpr (kMapped) e = expert_map[e];
  return e >= 0 && e < kExperts ? e : -1;
}

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

// Slots grouped by expert with no kernel before: every CTA makes the same table. Experts ascend, and so do the slots of
// each, so that an expert's token tiles follow each other.
//
// A warp knows 32 slots at a time, a word of them: which lanes have equal experts, and so how many slots of its expert
// in the word are before its own. A byte for each expert and word counts those; the bytes of an expert are summed up to
// a word, and experts are summed up to an expert.
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

  static constexpr bool kNeedsPreviousKernel = Facts::kFromPreviousKernel;  // whether it writes topk_ids
  static constexpr int kSharedBytes = sizeof(Table), kScratchBytes = (sizeof(Scratch) + 15) / 16 * 16;

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
};

// Dispatches of [expert, row of x, row of the result, rows], each cut into token tiles of its own. The kernel before
// (dispatches.cuh) has checked them: those out of range have no token tiles, and a row of the result has one owner. A
// slot is a row of the result.
template <class Facts>
struct DispatchTiles {
  static constexpr int kDispatches = Facts::kDispatches, kExperts = Facts::kExperts;
  static constexpr int kSourceRows = Facts::kSourceRows;  // of x
  static constexpr int kResultRows = Facts::kResultRows;
  static constexpr int kRows = Facts::kRows;                                            // of a token tile
  static constexpr int kSlots = kSourceRows > kResultRows ? kSourceRows : kResultRows;  // that rows of x are counted by
  static constexpr int kMostRows = kSourceRows < kResultRows ? kSourceRows : kResultRows;  // of a dispatch
  static constexpr int kMaxTiles = kDispatches * ((kMostRows + kRows - 1) / kRows);

  const int32_t* __restrict__ dispatches;  // [kDispatches, 4]
  // Not __restrict__: no read may move ahead of the wait for the kernel before.
  const int32_t* tile_ends;  // [kDispatches] token tiles of the dispatches up to each
  const int32_t* owners;     // [kResultRows] the dispatch that writes the row

  static constexpr bool kMayRepeat = false, kTaken = false, kNeedsPreviousKernel = true;
  static constexpr int kSharedBytes = 0, kScratchBytes = 0;

  template <int kThreads>
  struct Reader {
    const DispatchTiles& table;

    __device__ __forceinline__ Reader(const DispatchTiles& t, unsigned char*, unsigned char*) : table(t) {}
    __device__ __forceinline__ int count() const { return table.tile_ends[kDispatches - 1]; }
    __device__ __forceinline__ int expert(int tile) const { return table.dispatches[4 * dispatch(tile)]; }
    __device__ __forceinline__ int slot(int tile, int row) const {
      const int d = dispatch(tile), first = d == 0 ? 0 : table.tile_ends[d - 1];
      const int i = (tile - first) * kRows + row;
      if (i >= table.dispatches[4 * d + 3]) return -1;
      const int result_row = table.dispatches[4 * d + 2] + i;
      return table.owners[result_row] == d ? result_row : -1;
    }
    __device__ __forceinline__ int shift(int tile) const {
      const int d = dispatch(tile);
      return table.dispatches[4 * d + 1] - table.dispatches[4 * d + 2];
    }

   private:
    // Without branches, so that neighbouring calls for one tile become one.
    __device__ __forceinline__ int dispatch(int tile) const {
      int before = 0;  // dispatches that end at the tile or before it
#pragma unroll
      for (int step = 1 << 30; step > 0; step /= 2) {
        if (step >= kDispatches) continue;
        const int next = before + step;
        if (table.tile_ends[next <= kDispatches ? next - 1 : kDispatches - 1] <= tile && next < kDispatches) {
          before = next;
        }
      }
      return before;
    }
  };
};

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

// Rows sorted by group, whose sizes memory has: expert e has the rows of group kOffset + e. Every CTA finds where they
// begin and end. Sizes are not trusted: negative ones count as 0, and rows past the last are of no group.
//
// Where token tiles are multiplied in part, those with most rows come first: the full ones of all experts, and then
// what is left of each, by eighths of a tile. CTAs that take them by turns have equal shares then.
template <class Facts>
struct RaggedTiles {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kGroups = Facts::kGroups;
  static constexpr int kRows = Facts::kRows;       // of a token tile
  static constexpr bool kOffset = Facts::kOffset;  // whether the first expert is another group than the first
  static constexpr bool kMayRepeat = false, kTaken = false;
  static constexpr int kMaxTiles = kSlots < kExperts + kSlots / kRows ? kSlots : kExperts + kSlots / kRows;

  const int32_t* __restrict__ group_sizes;   // [kGroups]
  const int32_t* __restrict__ group_offset;  // [1] if kOffset

  static constexpr bool kMostFirst = kRows >= 48;

  struct Table {
    int first_rows[kExperts], end_rows[kExperts];
    int tile_ends[kExperts];  // of full tiles alone if kMostFirst
    int first_row, end_row;   // of all experts
    int full_tiles, tiles;
    uint16_t last_of[kMostFirst ? kExperts : 1];  // the expert of each tile that is not full
  };
  static_assert(kExperts <= 1 << 16, "an expert is 16 bits");

  static constexpr bool kNeedsPreviousKernel = false;
  static constexpr int kSharedBytes = (sizeof(Table) + 15) / 16 * 16, kScratchBytes = 0;

  template <int kThreads>
  struct Reader {
    const Table& table;

    __device__ __forceinline__ Reader(const RaggedTiles& groups, unsigned char* shared, unsigned char*)
        : table(*reinterpret_cast<Table*>(shared)) {
      Table& made = *reinterpret_cast<Table*>(shared);
      for (int e = threadIdx.x; e < kExperts; e += kThreads) made.first_rows[e] = made.end_rows[e] = 0;
      if (threadIdx.x == 0) made.first_row = made.end_row = 0;
      __syncthreads();
      if (threadIdx.x < 32) find_rows(groups, made);
      __syncwarp();
      if (threadIdx.x < 32) find_tiles(made);
      __syncthreads();
    }
    __device__ __forceinline__ int count() const { return table.tiles; }
    __device__ __forceinline__ int expert(int tile) const {
      if (kMostFirst && tile >= table.full_tiles) return table.last_of[tile - table.full_tiles];
      int before = 0;  // experts whose tiles end at this one or before it
#pragma unroll
      for (int step = 1 << 30; step > 0; step /= 2) {
        if (step >= kExperts) continue;
        const int next = before + step;
        if (next < kExperts && table.tile_ends[next - 1] <= tile) before = next;
      }
      return before;
    }
    __device__ __forceinline__ int slot(int tile, int row) const {
      const int e = expert(tile), first = e == 0 ? 0 : table.tile_ends[e - 1];
      const int of_expert = (kMostFirst && tile >= table.full_tiles ? table.tile_ends[e] : tile) - first;
      const int s = table.first_rows[e] + of_expert * kRows + row;
      return s < table.end_rows[e] ? s : -1;
    }
    __device__ __forceinline__ int shift(int) const { return 0; }

   private:
    // Sums stay at the number of rows, whatever the sizes are.
    __device__ __forceinline__ static int add_rows(int a, int b) { return min(uint32_t(a) + b, uint32_t(kSlots)); }

    __device__ __forceinline__ static void find_rows(const RaggedTiles& groups, Table& made) {
      const int lane = threadIdx.x;
      int offset = 0, end = 0;
      if constexpr (kOffset) offset = min(max(*groups.group_offset, -kExperts), kGroups);
#pragma unroll 1
      for (int base = 0; base < kGroups; base += 32) {
        const int g = base + lane;
        int rows = g < kGroups ? min(max(groups.group_sizes[g], 0), kSlots) : 0;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int below = __shfl_up_sync(~0u, rows, distance);
          if (lane >= distance) rows = add_rows(rows, below);
        }
        const int below = __shfl_up_sync(~0u, rows, 1);
        const int first = lane == 0 ? end : add_rows(end, below), last = add_rows(end, rows), e = g - offset;
        if (g < kGroups && e >= 0 && e < kExperts) {
          made.first_rows[e] = first, made.end_rows[e] = last;
          if (e == 0 || g == 0) made.first_row = first;
          if (e == kExperts - 1 || g == kGroups - 1) made.end_row = last;
        }
        end = __shfl_sync(~0u, last, 31);
      }
    }

    __device__ __forceinline__ static void find_tiles(Table& made) {
      const int lane = threadIdx.x;
      int end = 0, eighths[(kExperts + 31) / 32];  // of the tile that is not full; 0 where there is none
#pragma unroll(kMostFirst ? (kExperts + 31) / 32 : 1)
      for (int i = 0; i < (kExperts + 31) / 32; ++i) {
        const int e = 32 * i + lane, rows = e < kExperts ? made.end_rows[e] - made.first_rows[e] : 0;
        const int inclusive = end + inclusive_sum_of_warp(kMostFirst ? rows / kRows : (rows + kRows - 1) / kRows);
        if (e < kExperts) made.tile_ends[e] = inclusive;
        if constexpr (kMostFirst) eighths[i] = (rows % kRows * 8 + kRows - 1) / kRows;
        end = __shfl_sync(~0u, inclusive, 31);
      }
      if (lane == 0) made.full_tiles = end;
      if constexpr (kMostFirst) {
        int placed = 0;
#pragma unroll 1
        for (int most = 8; most > 0; --most) {
#pragma unroll
          for (int i = 0; i < (kExperts + 31) / 32; ++i) {
            const uint32_t alike = __ballot_sync(~0u, eighths[i] == most);
            if (eighths[i] == most) made.last_of[placed + __popc(alike & ((1u << lane) - 1))] = 32 * i + lane;
            placed += __popc(alike);
          }
        }
        end += placed;
      }
      if (lane == 0) made.tiles = end;
    }
  };
};
// Whether token tiles are in the order of their experts.
template <class TokenTiles>
constexpr bool kAscendExperts = false;
template <class Facts>
constexpr bool kAscendExperts<AlignedTiles<Facts>> = true;
template <class Facts>
constexpr bool kAscendExperts<GroupedTiles<Facts>> = true;

template <class TokenTiles>
constexpr bool kAreRagged = false;
template <class Facts>
constexpr bool kAreRagged<RaggedTiles<Facts>> = true;

// Whether there may be rows of the result that are of no expert, before and after those that are.
template <class TokenTiles>
constexpr bool kHasGaps = false;
template <class Facts>
constexpr bool kHasGaps<RaggedTiles<Facts>> = true;

// Makes these rows zero, by all CTAs together.
template <int kThreads, class TokenTiles, class Reader, class Epilogue>
__device__ __forceinline__ void clear_gaps(const Reader& reader, const Epilogue& epilogue) {
  if constexpr (kHasGaps<TokenTiles>) {
    constexpr int kPieces = Epilogue::kColumns * sizeof(epilogue.out[0]) / 16;  // of a row
    static_assert(Epilogue::kColumns * sizeof(epilogue.out[0]) % 16 == 0, "rows are cleared in 16-byte stores");
    int4* pieces = reinterpret_cast<int4*>(epilogue.out);
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = int64_t(gridDim.x) * kThreads;
    const int64_t before = int64_t(reader.table.first_row) * kPieces, after = int64_t(reader.table.end_row) * kPieces;
    for (int64_t i = first; i < before; i += stride) pieces[i] = int4{0, 0, 0, 0};
    for (int64_t i = after + first; i < int64_t(TokenTiles::kSlots) * kPieces; i += stride) {
      pieces[i] = int4{0, 0, 0, 0};
    }
  }
}

}  // namespace jmm
