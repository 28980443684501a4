// The mma.sync kernel's tile, and all that is known at compile time about a product that is cut into such tiles.
#pragma once

#include "gemm/problem.cuh"
#include "token_tiles/grouped.cuh"
#include "weights/fragments_bytes.cuh"
#include "weights/fragments_raw.cuh"

namespace jmm {

// How the work is cut. A CTA computes work tiles of kTokens x (kWarpsN * kUnits * 64 columns), kWarpsK warps sharing K.
// Where a product has fewer work tiles than the card has multiprocessors, a cluster of CTAs shares the K of a tile.
// Facts: MmaTile of jax_marlin_moe/cuda/kernels/mma.py.
template <class Facts>
struct MmaTile {
  static constexpr int kTokens = Facts::kTokens;        // rows of a token tile, a multiple of 8
  static constexpr int kUnits = Facts::kUnits;          // 64-column units of a warp
  static constexpr int kWarpsN = Facts::kWarpsN;        // warps side by side along the columns
  static constexpr int kWarpsK = Facts::kWarpsK;        // warps that share K
  static constexpr int kBlockK = Facts::kBlockK;        // rows of K in one stage of the ring
  static constexpr int kStages = Facts::kStages;        // stages of the ring
  static constexpr int kCtasPerSm = Facts::kCtasPerSm;  // resident CTAs that the register budget allows for
  static constexpr int kCluster = Facts::kCluster;      // CTAs that share K, neighbours in the grid
  static constexpr int kWarps = kWarpsN * kWarpsK;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kTokens % 8 == 0 && kTokens <= 32, "a lane holds the slot of one row");
  static_assert(kStages >= 2, "one stage is read while another is filled");
};

// What fragments have taken from codes already: those of bytes may hold a code less its zero point.
template <class Codes, class T>
__device__ constexpr float offset_of_codes() {
  if constexpr (kIsByte<T>) return Codes::kOffset;
  return 0.0f;
}

template <class Problem_, class Tile_, class TokenTiles_, class Epilogue_>
struct MmaShape {
  using Problem = Problem_;
  using Tile = Tile_;
  using TokenTiles = TokenTiles_;
  using Epilogue = Epilogue_;
  using T = typename Problem::T;
  using Code = typename Problem::Code;
  using Codes = typename Select<kIsByte<T>, ByteFragments<Code, T>, RawFragments<Code, T>>::Type;
  using Scales = ColumnScales<typename Problem::Scale, 8>;
  using Zeros = ColumnZeros<typename Problem::Zeros, Code, typename Problem::Scale>;
  using Packed = PackedTile<Code>;
  using KBlocks = jmm::KBlocks<Problem, Tile::kBlockK>;
  using Columns = ProductColumns<Problem, TokenTiles, Epilogue>;
  using ExpertIndex = typename Problem::ExpertIndex;
  // Of the elements of x.
  using RowOffset = Offset<((TokenTiles::kSlots - 1) / Problem::kSlotsPerRow + int64_t(1)) * Problem::kRowStride>;

  // Fragments: B has 8 tokens, sums have 16 columns by 8 tokens.
  static constexpr int kTokenFragments = Tile::kTokens / 8;
  using Sums = float[Tile::kUnits][kSubTiles][kTokenFragments][4];  // of a work tile
  // Whether codes have a zero point that the sums of x must take out.
  static constexpr bool kTokenSums = Zeros::kStored || Zeros::kBaked != offset_of_codes<Codes, T>();
  static constexpr int kStepWords = Problem::kUnits * Packed::kWords;  // of the packed matrix, in 16 rows of K

  // FP4 is bound by instructions (docs/kernels.md, "The mma.sync kernel"). The most groups of K side by side in the
  // columns of an MMA, where at most half of them have a token:
  static constexpr bool kBoundByInstructions = kSame<Code, E2M1>;
  static constexpr int kMostSides = kBoundByInstructions && !Problem::kInOrder && KBlocks::kScaleRows > 1 ? 2 : 1;
  // Steps of a k-block that are unrolled together, where `span` steps belong together.
  __device__ static constexpr int part_steps(int span) {
    const int part = span > 4 ? span : 4;
    return kBoundByInstructions && KBlocks::kHoldGroups && part < KBlocks::kSteps ? part : KBlocks::kSteps;
  }

  // Shares of K are whole k-blocks, as equal as possible. The last k-block of K may be shorter.
  static constexpr int kShares = Tile::kWarpsK * Tile::kCluster;
  static constexpr int kLastSteps = KBlocks::kSteps - KBlocks::kMissingRows / kStepRows;  // of the last k-block
  static constexpr bool kShortens = kLastSteps < KBlocks::kSteps;
  static_assert(KBlocks::kCount >= kShares, "every warp has a k-block");

  // Whether warps ask together which rows a token tile has, rather than read a table that the CTA makes of all: few
  // warps would take longer to make one. The loader is still at a work tile when its rows are wanted, so they are asked
  // for once. Where instructions bind, the table is measured to be faster: asking stands in the loop.
  static constexpr bool kAsksTogether = WarpsRead<TokenTiles, Tile::kThreads>::kTogether && Tile::kWarps <= 3 &&
                                        KBlocks::kCount / kShares >= Tile::kStages && !kBoundByInstructions;
  using Reader = typename Select<kAsksTogether, typename WarpsRead<TokenTiles, Tile::kThreads>::Reader,
                                 typename TokenTiles::template Reader<Tile::kThreads>>::Type;

  // With rows of bytes, sums are those of a k-block: they are scaled whether its group ends there or not.
  static constexpr bool kClosesBlocks = kIsByte<T>;
  static_assert(Problem::kGroup % Tile::kBlockK == 0 || Tile::kBlockK % Problem::kGroup == 0 ||
                    (kClosesBlocks && Problem::kGroups == 1),
                "a k-block is part of one group, or whole groups");
  static_assert(!kClosesBlocks || KBlocks::kScaleRows == 1, "a k-block of bytes has one scale for each column");

  // A gated tile has as many gate units as up units; its columns are those of the product. Gate and up of a column
  // belong to one warp where a warp has two units, to the lower and the upper half of the warps where it has one.
  static constexpr int kHalves = Columns::kHalves;
  static constexpr bool kPairedInWarp = Epilogue::kGated && Tile::kUnits == 2;
  static constexpr int kOutputUnits = Tile::kWarpsN * Tile::kUnits / kHalves;
  static constexpr int kUnitStride = kPairedInWarp ? Columns::kUnits : 1;  // between the units of a warp
  static constexpr int kColumnTiles = Columns::kUnits / kOutputUnits;
  static_assert(Tile::kWarpsN * Tile::kUnits % kHalves == 0, "gate and up come in pairs");
  static_assert(Columns::kCount % (kUnitColumns * kOutputUnits) == 0, "column tiles are whole");
  static_assert(TokenTiles::kRows == 1 || TokenTiles::kRows == Tile::kTokens, "rows of a token tile");

  // Sums need no exchange where one warp has all of K, and both of gate and up.
  static constexpr bool kExchanges = kShares > 1 || (Epilogue::kGated && !kPairedInWarp);
  static constexpr int kOwnUnits = kExchanges ? 1 : Tile::kUnits / kHalves;  // output units of a warp without exchange
  static constexpr int kSumFragments = kHalves * kOutputUnits * kSubTiles * kTokenFragments;  // of a work tile

  // The warps that share a part of K copy its tokens together, in pieces of 16 bytes.
  static constexpr int kCopyLanes = 32 * Tile::kWarpsN;
  static constexpr int kPieces = Tile::kBlockK / Problem::kPieceValues;  // of a token's row in a k-block
  static constexpr int kPiecesOfLane = (Tile::kTokens * kPieces + kCopyLanes - 1) / kCopyLanes;

  // Work tiles: CTAs, or clusters of them, take them by turns.
  static constexpr int64_t kWorkTiles = int64_t(TokenTiles::kMaxTiles) * kColumnTiles;
  static constexpr int64_t kMaxCtas = (kWorkTiles > 0 ? kWorkTiles : 1) * Tile::kCluster;
  __device__ __forceinline__ static int cta_of_cluster() { return blockIdx.x % Tile::kCluster; }
  __device__ __forceinline__ static int first_work_tile() { return blockIdx.x / Tile::kCluster; }
  __device__ __forceinline__ static int work_tile_stride() { return gridDim.x / Tile::kCluster; }

  // K-blocks and the first row of a share of K.
  __device__ __forceinline__ static int k_blocks_of(int share) {
    if constexpr (KBlocks::kCount % kShares == 0) return KBlocks::kCount / kShares;
    return (share + 1) * KBlocks::kCount / kShares - share * KBlocks::kCount / kShares;
  }
  __device__ __forceinline__ static int first_row(int share) {
    if constexpr (KBlocks::kCount % kShares == 0) return share * (KBlocks::kCount / kShares * Tile::kBlockK);
    return share * KBlocks::kCount / kShares * Tile::kBlockK;
  }
  // Whether a k-block of a share is the last one of K, of kLastSteps.
  __device__ __forceinline__ static bool is_short(int share, int k_block) {
    return kShortens && share == kShares - 1 && k_block == k_blocks_of(share) - 1;
  }

  // Which of gate and up a warp's unit is, and which of the tile's output units.
  __device__ __forceinline__ static int half_of(int warp_n, int u) {
    if constexpr (!Epilogue::kGated) return 0;
    return kPairedInWarp ? u : warp_n / kOutputUnits;
  }
  __device__ __forceinline__ static int output_unit(int warp_n, int u) {
    if constexpr (!Epilogue::kGated) return warp_n * Tile::kUnits + u;
    return kPairedInWarp ? warp_n : warp_n % kOutputUnits;
  }
  // The first of a lane's two columns of a sub-tile, of the result; the other one is 8 behind it.
  __device__ __forceinline__ static int column_of(int work_tile, int sub_tile, int lane) {
    return (work_tile % kColumnTiles * (kOutputUnits * kSubTiles) + sub_tile) * kSubTileColumns + lane / 4;
  }
  // The first unit of the packed matrix that a warp reads for a work tile.
  __device__ __forceinline__ static int first_unit(int work_tile, int warp_n) {
    return half_of(warp_n, 0) * Columns::kUnits + work_tile % kColumnTiles * kOutputUnits + output_unit(warp_n, 0);
  }
};

}  // namespace jmm
