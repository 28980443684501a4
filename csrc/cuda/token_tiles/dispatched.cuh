// Token tiles of a table of dispatches.
#pragma once

#include "types.cuh"

namespace jmm {

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

}  // namespace jmm
