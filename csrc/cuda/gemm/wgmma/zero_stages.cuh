// Stages of the ring that zero points have in products with rows of 8 bits (docs/kernels.md, "8-bit activations").
#pragma once

#include "gemm/wgmma/tile.cuh"

namespace jmm {

// What zero points take from the sums: a product of the scaled zero points of columns and k-blocks, and of the sums of
// the rows of x over k-blocks, which stand behind the rows. Both are two bfloat16 numbers each. Its operands have
// stages of the ring behind those of the tile's k-blocks, one for each 16 of these: scales where weights are else, and
// a row's sums as the first half of its 128 bytes.
template <class Shape>
struct WgmmaByteZeroStages {
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using Zeros = typename Shape::Zeros;
  using Scales = typename Shape::Scales;
  static constexpr bool kAny = Zeros::kStored || Zeros::kBaked != Shape::Codes::kOffset;
  static constexpr int kCount = kAny ? (Shape::KBlocks::kCount + 15) / 16 : 0;
  static constexpr int kPieces = 4;  // of 16 bytes, that a row's 16 sums have

  // The groups of 16 k-blocks.
  static constexpr int kRowsPerGroup = Problem::kGroups == 1 ? Problem::kK : Problem::kGroup;
  static constexpr int kMostGroups = (16 * Tile::kBlockK + kRowsPerGroup - 1) / kRowsPerGroup;
  static constexpr int kGroups = Problem::kGroups < kMostGroups ? Problem::kGroups : kMostGroups;
  static constexpr int kGroupBytes = Shape::kTileUnits * kUnitColumns * Scales::kBytes;
  static_assert(!kAny || kGroups * kGroupBytes <= Shape::kStageTiles * Shape::Packed::kBytes,
                "scales have room where weights are else");

  __device__ __forceinline__ static int group_of(int k_block) {
    return min(k_block * Tile::kBlockK / kRowsPerGroup, Problem::kGroups - 1);
  }
  // The first of a stage's groups: the last stage has some of the one before again.
  __device__ __forceinline__ static int first_group(int stage) {
    return min(16 * stage * Tile::kBlockK / kRowsPerGroup, Problem::kGroups - kGroups);
  }
};

// Those of any product: with rows of 16 bits, zero points leave weights or sums otherwise.
template <class Shape>
__device__ constexpr int zero_stages() {
  if constexpr (kIsByte<typename Shape::T>) return WgmmaByteZeroStages<Shape>::kCount;
  return 0;
}

}  // namespace jmm
