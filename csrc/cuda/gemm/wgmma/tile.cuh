// The wgmma kernel's tile, and all that is known at compile time about a product that is cut into such tiles.
#pragma once

#include "epilogue.cuh"
#include "gemm/problem.cuh"
#include "weights/fragments_fused.cuh"
#include "weights/fragments_offset.cuh"

namespace jmm {

// How the work is cut. A CTA computes work tiles of kTokens x (kWarpgroupsN * kSubTiles * 64 packed columns);
// the k-blocks go to kWarpgroupsK warpgroups by turns.
// Facts: WgmmaTile of jax_marlin_moe/cuda/kernels/wgmma.py.
template <class Facts_>
struct WgmmaTile {
  using Facts = Facts_;
  static constexpr int kTokens = Facts::kTokens;            // rows of a token tile
  static constexpr int kSubTiles = Facts::kSubTiles;        // 64-row products of a warpgroup: 1, 2 or 4
  static constexpr int kWarpgroupsN = Facts::kWarpgroupsN;  // of consumers, side by side along the columns
  static constexpr int kWarpgroupsK = Facts::kWarpgroupsK;  // that share K
  static constexpr int kBlockK = Facts::kBlockK;            // rows of K in one stage of the ring
  static constexpr int kStages = Facts::kStages;            // stages of the ring
  static constexpr int kCtasPerSm = Facts::kCtasPerSm;      // resident CTAs
  static constexpr int kCluster = 1;
  static constexpr bool kScalesWeights = Facts::kScalesWeights;
  static constexpr int kWarpgroups = kWarpgroupsN * kWarpgroupsK;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);  // one more is the producer
  // Registers of a thread, in eights: a CTA enters with an equal share each, and the producer hands on what it can
  // spare.
  static constexpr int kEntryRegisters = 65536 / (kCtasPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = Facts::kProducerRegisters;
  static constexpr int kConsumerRegisters = Facts::kConsumerRegisters;
  static constexpr int kOtherRegisters = Facts::kOtherRegisters;  // of a consumer, beside sums and weights
  // Bit i: whether a tile with at most 8 * (i + 1) rows multiplies only those, where that is less than a whole tile.
  static constexpr int64_t kRowCounts = Facts::kRowCounts;
  static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0, "as setmaxnreg takes them");
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= (kWarpgroups + 1) * kEntryRegisters,
                "the multiprocessor has them");
  static_assert(kTokens % 8 == 0 && kTokens <= 512, "columns of one wgmma or of two");
  static_assert(kBlockK % 64 == 0, "rows of 128 bytes in shared memory");
  // A wait names a phase by its parity, which is enough for a waiter that has seen the phase before it complete: the
  // k-blocks of a stage belong to one warpgroup. (Between work tiles all consumers synchronise.)
  static_assert(kStages % kWarpgroupsK == 0, "warpgroups that share K read different stages");
  static_assert(kStages >= 2 * kWarpgroupsK, "a warpgroup waits for its next stage before it releases this one");
};

// Whether rows have a scale for each 128 columns, behind the rest of a row: rows of 8 bits may.
template <class Problem>
__device__ constexpr bool has_row_groups() {
  if constexpr (kIsByte<typename Problem::T>) return Problem::Facts::kRowGroups;
  return false;
}

// What products with rows of any type have in common: a work tile's place among packed units, its stages and sums.
template <class Problem_, class Tile_, class TokenTiles_, class Epilogue_>
struct WgmmaWorkTiles {
  using Problem = Problem_;
  using Tile = Tile_;
  using TokenTiles = TokenTiles_;
  using Epilogue = Epilogue_;
  using T = typename Problem::T;
  using Code = typename Problem::Code;
  using Zeros = ColumnZeros<typename Problem::Zeros, Code, typename Problem::Scale>;
  using Packed = PackedTile<Code>;
  using KBlocks = jmm::KBlocks<Problem, Tile::kBlockK>;
  using Columns = ProductColumns<Problem, TokenTiles, Epilogue>;
  using Reader = typename TokenTiles::template Reader<Tile::kThreads>;
  using ExpertIndex = typename Problem::ExpertIndex;
  // Of the 16-byte pieces of x.
  using RowOffset = Offset<((TokenTiles::kSlots - 1) / Problem::kSlotsPerRow + int64_t(1)) *
                           (Problem::kRowStride / Problem::kPieceValues)>;

  // A gated tile has gate units and then as many up units; one thread has gate and up of a column. Each warp of a
  // warpgroup multiplies kWarpSubTiles sub-tiles of either half: four warps, that many units.
  static constexpr int kHalves = Columns::kHalves;
  static constexpr int kWarpSubTiles = Tile::kSubTiles / kHalves;
  static constexpr int kHalfUnits = Tile::kWarpgroupsN * kWarpSubTiles;
  static constexpr int kTileUnits = kHalves * kHalfUnits;
  // Where they do not divide the columns, the last column tile has columns of the one before again: with rows of bytes,
  // whose results have the same bits in both.
  static constexpr bool kWholeTiles = Columns::kUnits % kHalfUnits == 0;
  static constexpr int kColumnTiles = (Columns::kUnits + kHalfUnits - 1) / kHalfUnits;
  using Scales = ColumnScales<typename Problem::Scale, 2 * kWarpSubTiles>;
  // Of a stage: packed tiles, by step and then by unit, and units that have scales, by group and then by unit.
  static constexpr int kStageTiles = KBlocks::kSteps * kTileUnits;
  static constexpr int kStageScaleUnits = KBlocks::kScaleRows * kTileUnits;
  static_assert(Tile::kSubTiles % kHalves == 0, "gate and up come in pairs");
  static_assert(Columns::kCount % kUnitColumns == 0 && Columns::kUnits >= kHalfUnits, "column tiles are of units");
  static_assert(kWholeTiles || kIsByte<T>, "results of 16-bit rows are stored once");
  static_assert(TokenTiles::kRows == 1 || TokenTiles::kRows == Tile::kTokens, "rows of a token tile");

  static constexpr int kThreadSums = Tile::kSubTiles * Tile::kTokens / 2;  // of one set

  // Whether the producer has registers to hand on. 240 is the most that a consumer uses.
  static constexpr bool kMovesRegisters =
      Tile::kEntryRegisters < 240 && Tile::kEntryRegisters > Tile::kProducerRegisters;

  // Work tiles: CTAs take them by turns.
  static constexpr int64_t kWorkTiles = int64_t(TokenTiles::kMaxTiles) * kColumnTiles;
  static constexpr int64_t kMaxCtas = (kWorkTiles > 0 ? kWorkTiles : 1) * Tile::kCluster;

  // The first unit of a column tile, and the packed unit at a place in a work tile.
  __device__ __forceinline__ static int first_unit(int column_tile) {
    if constexpr (kWholeTiles) return column_tile * kHalfUnits;
    return min(column_tile * kHalfUnits, Columns::kUnits - kHalfUnits);
  }
  __device__ __forceinline__ static int packed_unit(int column_tile, int unit) {
    return unit / kHalfUnits * Columns::kUnits + first_unit(column_tile) + unit % kHalfUnits;
  }
};

template <class Problem, class Tile, class TokenTiles, class Epilogue>
struct WgmmaShape : WgmmaWorkTiles<Problem, Tile, TokenTiles, Epilogue> {
  using WorkTiles = WgmmaWorkTiles<Problem, Tile, TokenTiles, Epilogue>;
  using typename WorkTiles::KBlocks, typename WorkTiles::Zeros;
  using Codes = OffsetFragments<typename Problem::Code, typename Problem::T>;
  static constexpr bool kScalesSums = Problem::kGlobalScales;  // whether sums are multiplied by global scales
  static constexpr bool kFloatZeros = !Zeros::kWhole;
  // Whether one FMA makes a weight of its code.
  static constexpr bool kFuses = Tile::kScalesWeights && kSame<typename Problem::Scale, typename Problem::T> &&
                                 kFusesZero<typename Problem::Code, typename Problem::T, typename Problem::Zeros>;
  static_assert(Tile::kScalesWeights || (!kFloatZeros && !Problem::kGlobalScales),
                "a fraction of a zero point goes into weights that have their scale; sums are scaled group by group");

  // The last k-block ends where K does: the rows that it has from the k-block before are multiplied with zeros.
  static_assert(Problem::kK >= Tile::kBlockK && Problem::kK % kStepRows == 0, "K is k-blocks, of whole steps");
  static_assert(KBlocks::kCount >= Tile::kWarpgroupsK, "every warpgroup has a k-block");
  static_assert(Problem::kGroups == 1 || Problem::kGroup % Tile::kBlockK == 0 ||
                    (Tile::kBlockK % Problem::kGroup == 0 && Problem::kK % Problem::kGroup == 0),
                "a k-block is part of one group, or whole groups");

  // Whether lanes take turns at the words of a unit: where a warp reads one of four words, the first product's. Results
  // are scattered then, which costs more than conflicts do where sums leave registers for one step in flight only.
  static constexpr bool kTakesTurns = WorkTiles::kHalves == 2 && WorkTiles::kWarpSubTiles == 1 &&
                                      WorkTiles::Packed::kSubTileWords == 1 && Tile::kTokens <= 128 &&
                                      !kQuantizes<Epilogue> && !Zeros::kStored;

  // The sums of a group and those of the tile, unless there is one group or weights have their scale.
  static constexpr bool kTwoSums = !Tile::kScalesWeights && Problem::kGroups > 1;
};

}  // namespace jmm
