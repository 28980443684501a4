// The product with the transposed matrices on wgmma: what differs from the other way round (docs/kernels.md, "The
// product with the transpose"). The contraction runs over the columns of W; a work tile's columns are rows of W.
//
// A warp has neighbouring steps of 16 rows of W, so that they share their scales where a group has so many.
#pragma once

#include "gemm/wgmma/weights.cuh"
#include "ptx/hopper.cuh"
#include "ptx/memory.cuh"
#include "weights/fragments_scaled.cuh"

namespace jmm {

template <class Problem_, class Tile_, class TokenTiles_, class Epilogue_>
struct WgmmaTransposedShape {
  using Problem = Problem_;
  using Tile = Tile_;
  using TokenTiles = TokenTiles_;
  using Epilogue = Epilogue_;
  using T = typename Problem::T;
  using Code = typename Problem::Code;
  using Zeros = ColumnZeros<typename Problem::Zeros, Code, typename Problem::Scale>;
  using Scales = ColumnScales<typename Problem::Scale, 8>;
  using Packed = PackedTile<Code>;
  using Reader = typename TokenTiles::template Reader<Tile::kThreads>;
  using ExpertIndex = typename Problem::ExpertIndex;
  // Of the 16-byte pieces of x.
  using RowOffset = Offset<((TokenTiles::kSlots - 1) / Problem::kSlotsPerRow + int64_t(1)) *
                           (Problem::kRowStride / Problem::kPieceValues)>;
  static_assert(Epilogue::kColumns == Problem::kColumns, "rows of W are columns of the result");
  static_assert(TokenTiles::kExperts == Problem::kExperts, "token tiles are of the matrix's experts");
  static_assert(TokenTiles::kRows == 1 || TokenTiles::kRows == Tile::kTokens, "rows of a token tile");
  static_assert(Tile::kScalesWeights && Tile::kWarpgroupsK == 1, "a sum has many scales, and all columns of W");

  // The k-blocks are of N.
  struct KBlocks {
    static constexpr int kCount = Problem::kN / Tile::kBlockK, kMissingRows = 0;
    static constexpr int kSteps = Tile::kBlockK / kStepRows;
    static constexpr bool kHoldGroups = false;
    static constexpr int kUnits = Tile::kBlockK / kUnitColumns;
  };
  static_assert(Problem::kN % Tile::kBlockK == 0, "N is k-blocks");

  // A unit of 64 columns of the result is four steps of W.
  static constexpr int kHalves = 1, kWarpSubTiles = Tile::kSubTiles;
  static constexpr int kHalfUnits = Tile::kWarpgroupsN * kWarpSubTiles, kTileSteps = 4 * kHalfUnits;
  static constexpr int kTileRows = kTileSteps * kStepRows;
  static constexpr int kColumnTiles = Problem::kColumns / kTileRows;
  static_assert(Problem::kColumns % kTileRows == 0, "column tiles are whole");
  static constexpr int kTileGroups =
      Problem::kGroups == 1 || kTileRows < Problem::kGroup ? 1 : kTileRows / Problem::kGroup;
  static_assert(Problem::kGroups == 1 || Problem::kGroup % kTileRows == 0 || kTileRows % Problem::kGroup == 0,
                "a work tile is part of one group, or whole groups");

  static constexpr int kTileUnits = KBlocks::kUnits;
  static constexpr int kStageTiles = kTileSteps * KBlocks::kUnits;
  static constexpr int kStageScaleUnits = kTileGroups * KBlocks::kUnits;

  static constexpr bool kTwoSums = false, kScalesSums = false;
  static constexpr bool kTakesTurns = false;  // at the words of a unit: a lane reads whole pieces
  static constexpr int kThreadSums = Tile::kSubTiles * Tile::kTokens / 2;
  static constexpr bool kMovesRegisters =
      Tile::kEntryRegisters < 240 && Tile::kEntryRegisters > Tile::kProducerRegisters;

  static constexpr int64_t kWorkTiles = int64_t(TokenTiles::kMaxTiles) * kColumnTiles;
  static constexpr int64_t kMaxCtas = kWorkTiles > 0 ? kWorkTiles : 1;

  // The group of a step of the work tile, among the tile's.
  __device__ __forceinline__ static int group_of(int step) {
    return kTileGroups == 1 ? 0 : step * kStepRows / Problem::kGroup;
  }
};

// The weights of a stage: the k-block's units of the work tile's steps.
template <class Shape>
struct WgmmaTransposedCopies {
  using Problem = typename Shape::Problem;
  using KBlocks = typename Shape::KBlocks;
  using Zeros = typename Shape::Zeros;
  using Storage = WgmmaStorage<Shape>;
  static constexpr int kStoredZeroBytes = Zeros::kStored ? Zeros::kUnitBytes : 16;

  // kRows rows of an operand, with kUnitBytes for each unit: a run per row. The runs go to the four warps by turns.
  template <int kUnitBytes, int kRowsOfExpert, int kRows>
  struct Runs {
    static constexpr int64_t kRowBytes = int64_t(Problem::kUnits) * kUnitBytes;
    static constexpr int kRunBytes = KBlocks::kUnits * kUnitBytes;
    static_assert(kRunBytes % 16 == 0, "whole pieces");
    const int warp;
    const unsigned char* const source;

    __device__ __forceinline__ Runs(const void* operand, int expert, int first_row, int w)
        : warp(w),
          source(static_cast<const unsigned char*>(operand) +
                 (int64_t(expert) * kRowsOfExpert + first_row + w) * kRowBytes) {}

    __device__ __forceinline__ void copy(uint32_t target, int k_block, uint32_t barrier, uint64_t policy) const {
      const int runs = (kRows + 3 - warp) / 4;
      if (kRows >= 4 || runs > 0) mbarrier_expect_bytes(barrier, runs * kRunBytes);
#pragma unroll
      for (int i = 0; i < (kRows + 3) / 4; ++i) {
        if (kRows % 4 == 0 || i < runs) {
          copy_bulk<kRunBytes>(target + (warp + 4 * i) * kRunBytes,
                               source + 4 * i * kRowBytes + int64_t(k_block) * kRunBytes, barrier, policy);
        }
      }
    }
  };

  const Runs<Shape::Packed::kBytes, Problem::kK / kStepRows, Shape::kTileSteps> weights;
  const Runs<kUnitColumns * Shape::Scales::kBytes, Problem::kGroups, Shape::kTileGroups> scales;
  const Runs<kStoredZeroBytes, Problem::kGroups, Shape::kTileGroups> zeros;

  __device__ __forceinline__ WgmmaTransposedCopies(const Operands<Problem>& operands, int expert, int column_tile,
                                                   int warp)
      : weights(operands.packed, expert, column_tile * Shape::kTileSteps, warp),
        scales(operands.scales, expert, first_group(column_tile), warp),
        zeros(operands.zeros, expert, first_group(column_tile), warp) {}

  __device__ __forceinline__ void copy(uint32_t stage, int k_block, uint32_t barrier, uint64_t policy) const {
    weights.copy(stage, k_block, barrier, policy);
    scales.copy(stage + Storage::kScalesAt, k_block, barrier, policy);
    if constexpr (Zeros::kStored) zeros.copy(stage + Storage::kZerosAt, k_block, barrier, policy);
  }

 private:
  __device__ __forceinline__ static int first_group(int column_tile) {
    return Problem::kGroups == 1 ? 0 : column_tile * Shape::kTileRows / Problem::kGroup;
  }
};

// Shared memory to A fragments of the transpose. A batch is steps of 16 columns of W, as in WgmmaWeights.
template <class Shape>
struct WgmmaTransposedWeights {
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Packed = typename Shape::Packed;
  using Storage = WgmmaStorage<Shape>;
  using Lane = WgmmaLane<Shape>;
  using Scaled = ScaledFragments<Problem>;
  static constexpr float kResidualScale = Scaled::kResidualScale;
  static constexpr int kUnitSteps = kUnitColumns / kStepRows;

  // Steps of a warp that share scales are scaled by one set.
  static constexpr bool kShares = Shape::kTileGroups == 1 || Problem::kGroup % (Tile::kSubTiles * kStepRows) == 0;
  static constexpr int kSets = kShares ? 1 : Tile::kSubTiles;
  static constexpr int kSumRegisters = Tile::kSubTiles * Tile::kTokens / 2;
  static constexpr int kScalingRegisters =
      8 * kSets * (1 + Scaled::kSplits + Scaled::kFloatZeros + 2 * Scaled::Zeros::kStored);
  static constexpr int kBatchInRegisters =
      (Tile::kConsumerRegisters - Tile::kOtherRegisters - kSumRegisters - kScalingRegisters) /
      (2 * Tile::kSubTiles * 4);
  static constexpr int kLongestBatch = KBlocks::kSteps / 2 < kUnitSteps ? KBlocks::kSteps / 2 : kUnitSteps;
  static constexpr int kBatch = kBatchInRegisters >= 4 && kLongestBatch >= 4   ? 4
                                : kBatchInRegisters >= 2 && kLongestBatch >= 2 ? 2
                                                                               : 1;
  static constexpr int kBatches = KBlocks::kSteps / kBatch;
  using Words = uint32_t[Tile::kSubTiles][kBatch * Packed::kSubTileWords];
  using Fragments = uint32_t[kBatch][Tile::kSubTiles][4];

  // Of the unit at hand. Its global scale is fetched a unit ahead.
  struct Scaling {
    Scaled sets[kSets];
    const float* next_global;
    float global_ahead = 1.0f;
    int units_left;

    __device__ __forceinline__ void begin(const Operands<Problem>& operands, int expert) {
      if constexpr (Problem::kGlobalScales) {
        next_global = operands.global_scales + typename Problem::ExpertIndex(expert) * Problem::kUnits;
        global_ahead = *next_global;
        units_left = Problem::kUnits;
      }
    }
    __device__ __forceinline__ float global_scale() {
      const float now = global_ahead;
      if constexpr (Problem::kGlobalScales) {
        if (--units_left > 0) global_ahead = *++next_global;
      }
      return now;
    }
  };

  // The first of this warp's steps in the work tile.
  __device__ __forceinline__ static int first_step(const Lane& lane) {
    return (lane.warpgroup * 4 + lane.warp) * Tile::kSubTiles;
  }

  __device__ __forceinline__ static void load(Words& words, Scaling& scaling, uint32_t stage, int batch,
                                              const Lane& lane) {
    const int step = batch * kBatch, unit = step / kUnitSteps;
#pragma unroll
    for (int j = 0; j < Tile::kSubTiles; ++j) {
      load_shared_words(words[j], stage + ((first_step(lane) + j) * KBlocks::kUnits + unit) * Packed::kBytes +
                                      lane.lane * Packed::kLaneBytes + step % kUnitSteps * Packed::kSubTileWords * 4);
    }
    if (step % kUnitSteps == 0) {
      const float global_scale = scaling.global_scale();
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        const int place = Shape::group_of(first_step(lane) + set) * KBlocks::kUnits + unit;
        scaling.sets[set].load(stage + Storage::kScalesAt + place * kUnitColumns * Shape::Scales::kBytes,
                               stage + Storage::kZerosAt + place * Shape::Zeros::kUnitBytes, global_scale, lane.lane);
      }
    }
  }

  __device__ __forceinline__ static void make(Fragments& a, const Words& words, const Scaling& scaling, int batch) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) {
        scaling.sets[kShares ? 0 : j].transposed(words[j] + s * Packed::kSubTileWords,
                                                 (batch * kBatch + s) % kUnitSteps, a[s][j]);
      }
    }
#pragma unroll
    for (int s = 0; s < kBatch; ++s)
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) wgmma_operand_ready(a[s][j]);
  }
};

}  // namespace jmm
