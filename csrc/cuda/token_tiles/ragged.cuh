// Token tiles of rows that are sorted by group, and the rows of the result that are of no expert.
#pragma once

#include "scan.cuh"

namespace jmm {

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
