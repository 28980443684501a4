// What a table of dispatches says of the rows of the result and of token tiles (docs/formats.md, "Dispatches").
#pragma once

#include "ptx/synchronization.cuh"
#include "scan.cuh"

namespace jmm {

// Checks the table, counts what is out of range, finds where the token tiles of each dispatch end and which dispatch
// writes each row of the result, the last one that has it, and clears the rows that none has. The first CTA has the
// table, the others a row per warp. Facts: jax_marlin_moe/cuda/kernels/dispatches.py.
template <class Facts>
struct ResolveDispatches {
  using T = typename Facts::Element;  // of the result
  static constexpr int kDispatches = Facts::kDispatches, kExperts = Facts::kExperts;
  static constexpr int kSourceRows = Facts::kSourceRows;  // of x
  static constexpr int kResultRows = Facts::kResultRows, kColumns = Facts::kColumns;
  static constexpr int kRows = Facts::kRows;  // of a token tile
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int64_t kMaxCtas = 1 + (int64_t(kResultRows) + kWarps - 1) / kWarps;
  static constexpr int kPieces = kColumns * sizeof(T) / 16;  // of a row
  static_assert(kColumns * sizeof(T) % 16 == 0, "rows are cleared in 16-byte stores");

  const int32_t* __restrict__ dispatches;  // [kDispatches, 4]
  int32_t* __restrict__ tile_ends;         // [kDispatches]
  int32_t* __restrict__ owners;            // [kResultRows], -1 for none
  int32_t* __restrict__ skipped;           // [1]
  T* __restrict__ out;                     // [kResultRows, kColumns]

  __device__ void run() const {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (blockIdx.x == 0) {
      if (warp == 0) find_tiles(lane);
      return;
    }
    const int64_t row = (int64_t(blockIdx.x) - 1) * kWarps + warp;
    if (row < kResultRows) find_owner(static_cast<int>(row), lane);
  }

 private:
  struct Entry {
    int expert, source, target, rows;

    // Differences, since sums may be more than an int holds.
    __device__ __forceinline__ bool is_in_range() const {
      return expert >= 0 && expert < kExperts && rows >= 0 && source >= 0 && source <= kSourceRows - rows &&
             target >= 0 && target <= kResultRows - rows;
    }
  };

  __device__ __forceinline__ Entry entry(int d) const {
    const int4 words = reinterpret_cast<const int4*>(dispatches)[d];
    return {words.x, words.y, words.z, words.w};
  }

  __device__ __forceinline__ void find_tiles(int lane) const {
    constexpr int kOfLane = 4;
    int end = 0, out_of_range = 0;
#pragma unroll 1
    for (int base = 0; base < kDispatches; base += 32 * kOfLane) {
      const int first = base + lane * kOfLane;
      int tiles[kOfLane], sum = 0;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        tiles[i] = 0;
        if (first + i >= kDispatches) continue;
        const Entry found = entry(first + i);
        if (found.is_in_range()) {
          tiles[i] = (found.rows + kRows - 1) / kRows;
        } else {
          out_of_range += found.rows != 0;
        }
        sum += tiles[i];
      }
      const int inclusive = end + inclusive_sum_of_warp(sum);
      int position = inclusive - sum;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        position += tiles[i];
        if (first + i < kDispatches) tile_ends[first + i] = position;
      }
      end = __shfl_sync(~0u, inclusive, 31);
    }
    const int all = inclusive_sum_of_warp(out_of_range);
    if (lane == 31) *skipped = all;
  }

  __device__ __forceinline__ void find_owner(int row, int lane) const {
    int owner = -1;
#pragma unroll 4
    for (int d = lane; d < kDispatches; d += 32) {
      const Entry found = entry(d);
      if (found.is_in_range() && row >= found.target && row - found.target < found.rows) owner = d;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      owner = max(owner, __shfl_xor_sync(~0u, owner, distance));
    }
    if (lane == 0) owners[row] = owner;
    if (owner >= 0) return;
    int4* cleared = reinterpret_cast<int4*>(out) + int64_t(row) * kPieces;
    for (int piece = lane; piece < kPieces; piece += 32) cleared[piece] = int4{0, 0, 0, 0};
  }
};

}  // namespace jmm
