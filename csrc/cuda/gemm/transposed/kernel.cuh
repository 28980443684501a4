// Grouped product with the transposed matrices on mma.sync, on every architecture: y[slot] = x[slot's row] @ W^T, from
// the packed weights of x @ W (docs/kernels.md, "The product with the transpose").
//
// The contraction runs over the columns of W, one unit of 64 a stage. Weights are the A operand: 16 rows of W, which
// are columns of the result, by 16 columns. A CTA computes one work tile.
#pragma once

#include "epilogue.cuh"
#include "ptx/copies.cuh"
#include "ptx/matrices.cuh"
#include "ptx/memory.cuh"
#include "ptx/synchronization.cuh"
#include "token_tiles.cuh"
#include "weights/fragments_scaled.cuh"

namespace jmm {

// A CTA computes kTokens rows by kWarps * kSteps * 16 columns of the result.
// Facts: TransposedTile of jax_marlin_moe/cuda/kernels/transposed.py.
template <class Facts>
struct TransposedTile {
  static constexpr int kTokens = Facts::kTokens;  // rows of a token tile, a multiple of 8
  static constexpr int kWarps = Facts::kWarps;
  static constexpr int kSteps = Facts::kSteps;    // of 16 rows of W, of a warp
  static constexpr int kStages = Facts::kStages;  // of the ring
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileSteps = kWarps * kSteps;
  static_assert(kTokens % 8 == 0 && kTokens <= 64 && kTokens <= kThreads, "a thread holds the slot of a row");
  static_assert(kStages >= 2, "one stage is read while another is filled");
};

template <class Problem, class Tile, class TokenTiles, class Epilogue>
struct TransposedGemm {
  using T = typename Problem::T;
  using Packed = PackedTile<typename Problem::Code>;
  using Fragments = ScaledFragments<Problem>;
  using Scales = typename Fragments::Scales;
  using Zeros = typename Fragments::Zeros;
  using Reader = typename TokenTiles::template Reader<Tile::kThreads>;
  using RowOffset = Offset<((TokenTiles::kSlots - 1) / Problem::kSlotsPerRow + int64_t(1)) * Problem::kRowStride>;
  using ScaleElement = typename Problem::ScaleElement;
  using ZeroElement = typename Problem::ZeroElement;
  static_assert(Problem::kTransposed && Epilogue::kColumns == Problem::kColumns, "rows of W are columns");
  static_assert(TokenTiles::kRows == 1 || TokenTiles::kRows == Tile::kTokens, "rows of a token tile");
  static_assert(TokenTiles::kExperts == Problem::kExperts, "token tiles are of the matrix's experts");

  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kAllSteps = Problem::kK / kStepRows;     // of an expert
  static constexpr int kSteps = Problem::kColumns / kStepRows;  // of the slice
  static constexpr int kColumnTiles = (kSteps + Tile::kTileSteps - 1) / Tile::kTileSteps;
  static constexpr int kTileRows = Tile::kTileSteps * kStepRows;  // of W
  static constexpr int kTokenFragments = Tile::kTokens / 8;
  // Rows of scales of a work tile.
  static constexpr bool kOneGroup = Problem::kGroups == 1;
  static constexpr int kSliceGroups = kOneGroup ? 1 : (Problem::kColumns + Problem::kGroup - 1) / Problem::kGroup;
  static constexpr int kScaleRows = kOneGroup || kTileRows < Problem::kGroup ? 1 : kTileRows / Problem::kGroup;
  static_assert(kOneGroup || Problem::kGroup % kTileRows == 0 || kTileRows % Problem::kGroup == 0,
                "a work tile is part of one group, or whole groups");

  static constexpr int kUnitScaleBytes = kUnitColumns * Scales::kBytes;
  static constexpr int kZeroBytes = Zeros::kStored ? Zeros::kUnitBytes : 16;
  // A stage: packed tiles, scales, zero points, and rows of x in 16-byte pieces, swizzled by their row.
  static constexpr int kScalesAt = Tile::kTileSteps * Packed::kBytes;
  static constexpr int kZerosAt = kScalesAt + kScaleRows * kUnitScaleBytes;
  static constexpr int kTokensAt = (kZerosAt + (Zeros::kStored ? kScaleRows * kZeroBytes : 0) + 127) / 128 * 128;
  static constexpr int kStageBytes = kTokensAt + Tile::kTokens * 128;
  static constexpr int kSlotsAt = Tile::kStages * kStageBytes;
  static constexpr int kTokenTilesAt = kSlotsAt + Tile::kTokens * 8;
  static constexpr int kSharedBytes = kTokenTilesAt + TokenTiles::kSharedBytes;
  static_assert(TokenTiles::kScratchBytes <= kSlotsAt, "the ring lends its memory before it is filled");
  static constexpr int64_t kWorkTiles = int64_t(TokenTiles::kMaxTiles) * kColumnTiles;
  static constexpr int64_t kMaxCtas = kWorkTiles > 0 ? kWorkTiles : 1;

  Operands<Problem> operands;
  TokenTiles token_tiles;
  Epilogue epilogue;

  __device__ void run(unsigned char* shared_bytes) const {
    wait_for_previous_kernel();
    allow_next_kernel();
    const Reader reader(token_tiles, shared_bytes + kTokenTilesAt, shared_bytes);
    clear_gaps<kThreads, TokenTiles>(reader, epilogue);
    const int token_tile = blockIdx.x / kColumnTiles, column_tile = blockIdx.x % kColumnTiles;
    if (token_tile >= reader.count()) return;
    const int expert = reader.expert(token_tile);
    if (expert < 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int* slots = reinterpret_cast<int*>(shared_bytes + kSlotsAt);
    float* factors = reinterpret_cast<float*>(slots + Tile::kTokens);
    if (threadIdx.x < Tile::kTokens) {
      int slot = reader.slot(token_tile, threadIdx.x);
      if constexpr (TokenTiles::kMayRepeat) slot = reader.first_listed(slot, token_tile, threadIdx.x);
      slots[threadIdx.x] = slot;
      factors[threadIdx.x] = slot >= 0 ? epilogue.factor(slot) : 0.0f;
    }
    __syncthreads();  // also: the ring is no longer lent
    int rows = 0;     // the last real row + 1
    for (int r = lane; r < Tile::kTokens; r += 32) rows = max(rows, slots[r] >= 0 ? r + 1 : 0);
    rows = max_of_warp(rows);
    if (rows == 0) return;

    const uint32_t ring = smem_address(shared_bytes);
    const int first_step = column_tile * Tile::kTileSteps;
    constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
    for (int unit = 0; unit < kAhead; ++unit) {
      if (unit < Problem::kUnits) copy(ring + unit * kStageBytes, unit, expert, first_step, slots, rows);
      commit_copies();
    }
    float sums[Tile::kSteps][kTokenFragments][4] = {};
    int stage = 0, filled = kAhead;
#pragma unroll 1
    for (int unit = 0; unit < Problem::kUnits; ++unit) {
      wait_copies<kAhead - 1>();
      __syncthreads();  // everybody's copies have arrived, and nobody reads the stage that is filled next
      if (unit + kAhead < Problem::kUnits) {
        copy(ring + filled * kStageBytes, unit + kAhead, expert, first_step, slots, rows);
      }
      commit_copies();
      filled = filled + 1 == Tile::kStages ? 0 : filled + 1;
      multiply(ring + stage * kStageBytes, expert, unit, first_step + warp * Tile::kSteps, warp, lane, rows, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    wait_copies<0>();

    // Epilogue.
    const typename Problem::ExpertIndex index = expert;
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) {
      const int step = first_step + warp * Tile::kSteps + s;
      if (step >= kSteps) break;
#pragma unroll
      for (int t = 0; t < kTokenFragments; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = t * 8 + lane % 4 * 2 + i % 2, column = step * kStepRows + lane / 4 + i / 2 * 8;
          if (slots[row] < 0) continue;
          epilogue.store(index, slots[row], factors[row], column, sums[s][t][i] * Fragments::kResidualScale, 0.0f,
                         epilogue.biases(index, column));
        }
      }
    }
  }

 private:
  // The maximum over a warp.
  __device__ __forceinline__ static int max_of_warp(int value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(~0u, value, distance));
    return value;
  }

  // Starts the copies of one unit of the contraction. Steps past the last one, and rows that are padding, are not
  // copied: they are multiplied into sums that are never stored.
  __device__ __forceinline__ void copy(uint32_t stage, int unit, int expert, int first_step, const int* slots,
                                       int rows) const {
    constexpr int kTilePieces = Packed::kBytes / 16;
    const int64_t first_tile = (int64_t(expert) * kAllSteps + first_step) * Problem::kUnits + unit;
    for (int i = threadIdx.x; i < Tile::kTileSteps * kTilePieces; i += kThreads) {
      const int step = i / kTilePieces, piece = i % kTilePieces;
      if (first_step + step >= kSteps) break;
      const int4* source =
          reinterpret_cast<const int4*>(operands.packed) + (first_tile + step * Problem::kUnits) * kTilePieces + piece;
      copy16(stage + step * Packed::kBytes + Packed::piece_at(piece), source);
    }
    const int first_group = kOneGroup ? 0 : first_step * kStepRows / Problem::kGroup;
    const int64_t first_row = (int64_t(expert) * Problem::kGroups + first_group) * Problem::kUnits + unit;
    const int groups = min(kScaleRows, kSliceGroups - first_group);
    copy_groups<kUnitScaleBytes>(stage + kScalesAt, operands.scales, first_row, groups);
    if constexpr (Zeros::kStored) copy_groups<kZeroBytes>(stage + kZerosAt, operands.zeros, first_row, groups);
    for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
      const int row = i / 8, piece = i % 8;
      if (slots[row] < 0) continue;
      const RowOffset offset = static_cast<RowOffset>(slots[row] / Problem::kSlotsPerRow) * Problem::kRowStride;
      copy16(stage + kTokensAt + row * 128 + (piece ^ row % 8) * 16,
             operands.x + offset + unit * kUnitColumns + piece * 8);
    }
  }

  template <int kBytes>
  __device__ __forceinline__ static void copy_groups(uint32_t stage, const unsigned char* source, int64_t first_row,
                                                     int groups) {
    constexpr int kPieces = kBytes / 16;
    for (int i = threadIdx.x; i < groups * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      copy16(stage + row * kBytes + piece * 16, source + (first_row + row * Problem::kUnits) * kBytes + piece * 16);
    }
  }

  __device__ __forceinline__ static void multiply_sub_tile(uint32_t tokens, const uint32_t* words, int w,
                                                           const Fragments& fragments, int lane, int rows,
                                                           float (&sums)[kTokenFragments][4]) {
    uint32_t a[4];
    fragments.transposed(words, w, a);
#pragma unroll
    for (int t = 0; t < kTokenFragments; ++t) {
      if (t > 0 && t * 8 >= rows) break;
      uint32_t b[2];
      const int row = t * 8 + lane % 8, piece = 2 * w + lane / 8 % 2;
      load_matrices_x2(b, tokens + row * 128 + (piece ^ row % 8) * 16);
      mma_16x8x16<T>(sums[t], a, b);
    }
  }

  __device__ __forceinline__ void multiply(uint32_t stage, int expert, int unit, int first_step, int warp, int lane,
                                           int rows, float (&sums)[Tile::kSteps][kTokenFragments][4]) const {
    float global_scale = 1.0f;
    if constexpr (Problem::kGlobalScales) {
      global_scale = operands.global_scales[typename Problem::ExpertIndex(expert) * Problem::kUnits + unit];
    }
    Fragments fragments;
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) {
      if (first_step + s >= kSteps) break;
      const int row = (warp * Tile::kSteps + s) * kStepRows;  // of W, in the tile
      const int group = kScaleRows == 1 ? 0 : row / Problem::kGroup;
      fragments.load(stage + kScalesAt + group * kUnitScaleBytes, stage + kZerosAt + group * kZeroBytes, global_scale,
                     lane);
      uint32_t words[Packed::kLaneWords];
      Packed::load_words(words, stage + (warp * Tile::kSteps + s) * Packed::kBytes, lane);
      const uint32_t tokens = stage + kTokensAt;
#pragma unroll
      for (int w = 0; w < kSubTiles; ++w) {
        multiply_sub_tile(tokens, words + w * Packed::kSubTileWords, w, fragments, lane, rows, sums[s]);
      }
    }
  }
};

}  // namespace jmm
