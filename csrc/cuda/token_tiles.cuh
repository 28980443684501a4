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
constexpr int kMostGroupedSlots = 128;  // and those of shared experts

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

// Slots grouped by expert with no kernel before: every CTA makes the same table. Experts are in the order of their
// first slots, the slots of an expert in their own, so that an expert's token tiles follow each other.
template <class Facts>
struct GroupedTiles {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kRoutedExperts = Facts::kRoutedExperts;  // that topk_ids may name
  static constexpr int kRows = Facts::kRows;                    // of a token tile
  static constexpr bool kMapped = Facts::kMapped;               // whether there is an expert_map
  static constexpr bool kMayRepeat = false, kTaken = false;

  const int32_t* __restrict__ topk_ids;    // [kSlots]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped

  static constexpr int kWords = (kSlots + 31) / 32;  // of a set of slots
  static constexpr int kNoSlot = 255;
  static_assert(kSlots - Facts::kSharedSlots <= kMostGroupedSlots && kSlots < kNoSlot, "a slot is a byte");
  static_assert(kExperts <= 1 << 16, "an expert is 16 bits");
  static constexpr int kMaxTiles = kSlots < kExperts + kSlots / kRows ? kSlots : kExperts + kSlots / kRows;

  struct Table {
    unsigned char slots[(kMaxTiles * kRows + 15) / 16 * 16];  // kNoSlot where the row is padding
    uint16_t experts[(kMaxTiles + 7) / 8 * 8];
    unsigned char first_tiles[32 * kWords];  // at an expert's first slot: its first tile, less those of words before
    uint32_t tiles_of_word[kWords > 4 ? 8 : 4];  // that the experts whose first slots are in a word have
  };

  static constexpr bool kNeedsPreviousKernel = Facts::kFromPreviousKernel;  // whether it writes topk_ids
  static constexpr int kSharedBytes = sizeof(Table);
  static constexpr int kScratchBytes = kExperts * kWords * 4;  // the set of each expert's slots

  template <int kThreads>
  struct Reader {
    const Table& table;
    int tiles = 0;

    __device__ __forceinline__ Reader(const GroupedTiles& slots, unsigned char* shared, unsigned char* scratch)
        : table(*reinterpret_cast<Table*>(shared)) {
      constexpr int kSlotsOfThread = (32 * kWords + kThreads - 1) / kThreads;
      Table& made = *reinterpret_cast<Table*>(shared);
      uint32_t (*members)[kWords] = reinterpret_cast<uint32_t (*)[kWords]>(scratch);

      int experts[kSlotsOfThread], ranks[kSlotsOfThread];
#pragma unroll
      for (int i = 0; i < kSlotsOfThread; ++i) {
        const int slot = i * kThreads + threadIdx.x;
        experts[i] = -1;
        if (slot < kSlots) {
          experts[i] = expert_of_slot<kExperts, kRoutedExperts, kMapped>(slots.topk_ids, slots.expert_map, slot);
        }
      }
      fill(scratch, kScratchBytes, 0);
      fill(made.slots, sizeof(made.slots), kNoSlot * 0x01010101u);
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kSlotsOfThread; ++i) {
        const int slot = i * kThreads + threadIdx.x;
        if (experts[i] >= 0) atomicOr(&members[experts[i]][slot / 32], 1u << slot % 32);
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kSlotsOfThread; ++i) {
        const int slot = i * kThreads + threadIdx.x;
        ranks[i] = 0;
        int expert_tiles = 0;  // at the expert's first slot
        if (experts[i] >= 0) {
          const uint32_t (&set)[kWords] = members[experts[i]];
          ranks[i] = count_below(set, slot);
          if (ranks[i] == 0) expert_tiles = (count_below(set, kSlots) + kRows - 1) / kRows;
        }
        const int end = inclusive_sum_of_warp(expert_tiles);
        if (expert_tiles > 0) made.first_tiles[slot] = end - expert_tiles;
        if (slot % 32 == 31 && slot < 32 * kWords) made.tiles_of_word[slot / 32] = end;
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kSlotsOfThread; ++i) {
        if (experts[i] < 0) continue;
        const int first = lowest(members[experts[i]]);
        int tile = made.first_tiles[first] + ranks[i] / kRows;
#pragma unroll
        for (int w = 0; w < kWords - 1; ++w) tile += first / 32 > w ? made.tiles_of_word[w] : 0;
        made.slots[tile * kRows + ranks[i] % kRows] = i * kThreads + threadIdx.x;
        if (ranks[i] % kRows == 0) made.experts[tile] = experts[i];
      }
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kWords; ++w) tiles += table.tiles_of_word[w];
    }

    __device__ __forceinline__ int count() const { return tiles; }
    __device__ __forceinline__ int expert(int tile) const { return table.experts[tile]; }
    __device__ __forceinline__ int slot(int tile, int row) const {
      const int s = table.slots[tile * kRows + row];
      return s == kNoSlot ? -1 : s;
    }
    __device__ __forceinline__ int shift(int) const { return 0; }

   private:
    __device__ __forceinline__ static void fill(void* words, int bytes, uint32_t value) {
      for (int i = threadIdx.x; i < bytes / 4; i += kThreads) static_cast<uint32_t*>(words)[i] = value;
    }
    // How many of a set are less than `slot`.
    __device__ __forceinline__ static int count_below(const uint32_t (&set)[kWords], int slot) {
      int count = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int bits = slot - 32 * w;
        count += bits >= 32 ? __popc(set[w]) : bits > 0 ? __popc(set[w] & ((1u << bits) - 1)) : 0;
      }
      return count;
    }
    __device__ __forceinline__ static int lowest(const uint32_t (&set)[kWords]) {
      int slot = 0;
#pragma unroll
      for (int w = kWords - 1; w >= 0; --w) slot = set[w] != 0 ? 32 * w + __ffs(set[w]) - 1 : slot;
      return slot;
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

  struct Table {
    int first_rows[kExperts], end_rows[kExperts], tile_ends[kExperts];
    int first_row, end_row, tiles;  // of all experts
  };

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
      const int s = table.first_rows[e] + (tile - first) * kRows + row;
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
      int end = 0;
#pragma unroll 1
      for (int base = 0; base < kExperts; base += 32) {
        const int e = base + lane;
        const int tiles = e < kExperts ? (made.end_rows[e] - made.first_rows[e] + kRows - 1) / kRows : 0;
        const int inclusive = end + inclusive_sum_of_warp(tiles);
        if (e < kExperts) made.tile_ends[e] = inclusive;
        end = __shfl_sync(~0u, inclusive, 31);
      }
      if (lane == 0) made.tiles = end;
    }
  };
};

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
