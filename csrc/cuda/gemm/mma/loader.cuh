// Global to shared memory: the copies of one warp of the mma.sync kernel.
#pragma once

#include "gemm/mma/storage.cuh"
#include "ptx/copies.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// Walks the (work tile, k-block) sequence of one warp ahead of the multiplication and fills its ring of weights, and
// this warp's part of the ring of tokens.
template <class Shape>
struct MmaLoader {
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Packed = typename Shape::Packed;
  using Zeros = typename Shape::Zeros;
  using Reader = typename Shape::Reader;
  using Storage = MmaStorage<Shape>;

  const Operands<Problem>& operands;
  const Reader& token_tiles;
  const int warp_n, share, lane, work_tiles;
  const uint64_t policy = evict_first_policy();
  int work_tile, k_block = 0;
  int expert, row;                                             // of the work tile; lane r holds row r of x
  int next_expert, next_row;                                   // of the work tile after it, fetched ahead
  int slot;                                                    // likewise of the lane's row, where warps ask together
  const uint32_t* weights;                                     // this lane's 16 bytes of the k-block's first step
  const typename Shape::T* tokens;                             // the k-block's first column of x, this lane's piece
  typename Shape::RowOffset token_rows[Shape::kPiecesOfLane];  // element offsets of the rows of this lane's pieces
  uint32_t token_copies;                                       // bit i: piece i exists
  uint32_t token_targets[Shape::kPiecesOfLane];                // where they go in a stage
  const unsigned char* scales;                                 // this lane's first piece of the k-block's groups
  const unsigned char* zeros;                                  // likewise, where zero points are stored
  int rows_left;                                               // of K, in the current group

  __device__ __forceinline__ MmaLoader(const Operands<Problem>& o, const Reader& r, int wn, int s, int l, int t)
      : operands(o), token_tiles(r), warp_n(wn), share(s), lane(l), work_tiles(t), work_tile(Shape::first_work_tile()) {
#pragma unroll
    for (int i = 0; i < Shape::kPiecesOfLane; ++i) {
      const int piece = i * Shape::kCopyLanes + copy_lane();
      token_targets[i] = Storage::token_piece(piece / Shape::kPieces, piece % Shape::kPieces);
      // Few are kept: the compiler would rather make them again for each k-block.
      if constexpr (Shape::kPiecesOfLane <= 2) token_targets[i] = opaque(token_targets[i]);
    }
    if constexpr (Shape::kAsksTogether) {  // weights may be on their way before it is known which rows there are
      expert = work_tile < work_tiles ? token_tiles.expert(work_tile / Shape::kColumnTiles) : -1;
      begin_weights();
    } else {
      fetch(work_tile, expert, row);
      fetch(work_tile + Shape::work_tile_stride(), next_expert, next_row);
      begin_tile();
    }
  }

  // Of the first work tile, where warps ask together: before the first tokens and scales.
  __device__ __forceinline__ void find_rows() {
    fetch(work_tile, expert, row);
    begin_tile();
  }

  // `ahead` k-blocks past the cursor, within its work tile.
  __device__ __forceinline__ void load_weights(uint32_t stage, int ahead) const {
    if (expert < 0) return;
    const uint32_t* source = weights + ahead * KBlocks::kSteps * Shape::kStepWords;
    const bool shortened = Shape::is_short(share, k_block + ahead);
#pragma unroll
    for (int step = 0; step < KBlocks::kSteps; ++step) {
      if (step == Shape::kLastSteps && shortened) break;
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
#pragma unroll
        for (int half = 0; half < Packed::kSubTileWords; ++half) {
          copy16_streamed(stage + step * Storage::kStepBytes + u * Packed::kBytes + Packed::piece_at(half * 32 + lane),
                          source + step * Shape::kStepWords + u * Shape::kUnitStride * Packed::kWords + half * 128,
                          policy);
        }
      }
    }
  }

  // A token's row that does not exist is not copied: it is multiplied in a column of its own, which is never stored.
  __device__ __forceinline__ void load_tokens(uint32_t stage) const {
    if (expert < 0 || (Shape::is_short(share, k_block) &&
                       copy_lane() % Shape::kPieces >= Shape::kLastSteps * kStepRows / Problem::kPieceValues)) {
      return;
    }
#pragma unroll
    for (int i = 0; i < Shape::kPiecesOfLane; ++i) {
      if (token_copies >> i & 1) {
        copy16(stage + token_targets[i], tokens + token_rows[i]);
      }
    }
  }

  // Scales and zero points are wanted when sums are scaled.
  __device__ __forceinline__ void load_scales(uint32_t stage) const {
    if (expert < 0 || (!Shape::kClosesBlocks && rows_left > Tile::kBlockK && k_block < Shape::k_blocks_of(share) - 1)) {
      return;
    }
    copy_rows<Storage::kUnitScaleBytes>(stage + Storage::kScalesAt, scales);
    if constexpr (Zeros::kStored) copy_rows<Zeros::kUnitBytes>(stage + Storage::kZerosAt, zeros);
  }

  __device__ __forceinline__ void advance() {
    weights += KBlocks::kSteps * Shape::kStepWords;
    tokens += Tile::kBlockK;
    rows_left -= Tile::kBlockK;
    if (rows_left <= 0) {
      rows_left = Problem::kGroup;
      scales += KBlocks::kScaleRows * Problem::kUnits * Storage::kUnitScaleBytes;
      if constexpr (Zeros::kStored) zeros += KBlocks::kScaleRows * Problem::kUnits * Zeros::kUnitBytes;
    }
    if (++k_block == Shape::k_blocks_of(share)) {
      k_block = 0;
      work_tile += Shape::work_tile_stride();
      if constexpr (Shape::kAsksTogether) {
        find_rows();
      } else {
        expert = next_expert;
        row = next_row;
        fetch(work_tile + Shape::work_tile_stride(), next_expert, next_row);
        begin_tile();
      }
    }
  }

 private:
  __device__ __forceinline__ int copy_lane() const { return warp_n * 32 + lane; }

  __device__ __forceinline__ void fetch(int t, int& e, int& r) {
    e = r = -1;
    if (t >= work_tiles) return;
    const int token_tile = t / Shape::kColumnTiles;
    e = token_tiles.expert(token_tile);
    if constexpr (Shape::kAsksTogether) {
      slot = token_tiles.slot(token_tile, lane);
      r = slot < 0 ? -1 : slot / Problem::kSlotsPerRow + token_tiles.shift(token_tile);
    } else if (lane < Tile::kTokens) {
      const int slot = token_tiles.slot(token_tile, lane);
      r = slot < 0 ? -1 : slot / Problem::kSlotsPerRow + token_tiles.shift(token_tile);
    }
    if (!__any_sync(~0u, r >= 0)) e = -1;  // nothing but padding
  }

  __device__ __forceinline__ void begin_weights() {
    const int k = Shape::first_row(share);
    const int unit = Shape::first_unit(work_tile, warp_n);
    const ExpertArray<Problem, int32_t> packed(operands.packed, operands.shared_packed, max(expert, 0));
    weights = reinterpret_cast<const uint32_t*>(packed.elements) +
              (int64_t(packed.expert) * (Problem::kK / kStepRows) + k / kStepRows) * Shape::kStepWords +
              unit * Packed::kWords + lane * 4;
  }

  __device__ __forceinline__ void begin_tile() {
    const int k = Shape::first_row(share);
    const int unit = Shape::first_unit(work_tile, warp_n);
    begin_weights();
    tokens = operands.x + k + copy_lane() % Shape::kPieces * Problem::kPieceValues;
    token_copies = 0;
#pragma unroll
    for (int i = 0; i < Shape::kPiecesOfLane; ++i) {
      const int r = (i * Shape::kCopyLanes + copy_lane()) / Shape::kPieces;
      const int source_row = __shfl_sync(~0u, row, r % 32);
      token_rows[i] = static_cast<typename Shape::RowOffset>(max(source_row, 0)) * Problem::kRowStride;
      if (r < Tile::kTokens && source_row >= 0 && expert >= 0) token_copies |= 1u << i;
    }
    rows_left = Problem::kGroup - k % Problem::kGroup;
    const ExpertArray<Problem, unsigned char> all_scales(operands.scales, operands.shared_scales, max(expert, 0));
    scales = first_piece<Storage::kUnitScaleBytes>(all_scales, k / Problem::kGroup, unit);
    if constexpr (Zeros::kStored) {
      const ExpertArray<Problem, unsigned char> all_zeros(operands.zeros, operands.shared_zeros, max(expert, 0));
      zeros = first_piece<Zeros::kUnitBytes>(all_zeros, k / Problem::kGroup, unit);
    }
  }

  // Of the rows that begin with `group`, kBytes for each unit: pieces follow each other by unit, then by row.
  template <int kBytes>
  __device__ __forceinline__ const unsigned char* first_piece(const ExpertArray<Problem, unsigned char>& all, int group,
                                                              int unit) const {
    constexpr int kPieces = kBytes / 16, kRowPieces = Tile::kUnits * kPieces;
    const int row = group + lane / kRowPieces, u = unit + lane % kRowPieces / kPieces * Shape::kUnitStride;
    return all.elements + ((int64_t(all.expert) * Problem::kGroups + row) * Problem::kUnits + u) * kBytes +
           lane % kPieces * 16;
  }

  // The rows of kScaleRows groups, kBytes for each unit.
  template <int kBytes>
  __device__ __forceinline__ void copy_rows(uint32_t shared, const unsigned char* source) const {
    constexpr int kRowPieces = Tile::kUnits * (kBytes / 16), kAllPieces = KBlocks::kScaleRows * kRowPieces;
    static_assert(32 % kRowPieces == 0, "32 lanes have whole rows");
    constexpr int kLastRows = (Shape::kLastSteps + KBlocks::kStepsPerScale - 1) / KBlocks::kStepsPerScale;
    const int rows =
        kLastRows < KBlocks::kScaleRows && Shape::is_short(share, k_block) ? kLastRows : KBlocks::kScaleRows;
#pragma unroll
    for (int i = 0; i < kAllPieces; i += 32) {
      const int piece = i + lane;
      if ((kAllPieces % 32 == 0 && kLastRows == KBlocks::kScaleRows) || piece / kRowPieces < rows) {
        copy16(shared + piece * 16, source + i / kRowPieces * (Problem::kUnits * kBytes));
      }
    }
  }
};

}  // namespace jmm
