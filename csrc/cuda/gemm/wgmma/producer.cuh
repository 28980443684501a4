// Global to shared memory: the producer warpgroup of the wgmma kernel.
//
// It walks the work tiles ahead of the consumers and fills stages (docs/kernels.md, "The wgmma kernel"):
//
//   producer     wait empty(s) | bulk copies, cp.async -> s | arrive full(s) | next stage ...
#pragma once

#include "gemm/named_barriers.cuh"
#include "gemm/wgmma/weight_copies.cuh"
#include "gemm/wgmma/zero_stages.cuh"
#include "ptx/copies.cuh"
#include "ptx/hopper.cuh"
#include "ptx/synchronization.cuh"
#include "token_tiles.cuh"

namespace jmm {

// Whether weights stay in L2 as anything else does. Others leave it first.
template <class T, class Tile>
__device__ constexpr bool keeps_weights() {
  if constexpr (kIsByte<T>) return Tile::Facts::kKeepsWeights;
  return false;
}

// Token tiles of a band.
template <class T, class Tile>
__device__ constexpr int band_of() {
  if constexpr (kIsByte<T>) return Tile::Facts::kBand;
  return 1;
}

// Gemm is the kernel.
template <class Gemm>
struct WgmmaProducer {
  using Shape = typename Gemm::Shape;
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using TokenTiles = typename Shape::TokenTiles;
  using KBlocks = typename Shape::KBlocks;
  using Reader = typename Shape::Reader;
  using Storage = WgmmaStorage<Shape>;
  using Shared = WgmmaShared<Shape>;
  using Record = typename Storage::Record;
  using Stage = Cursor<Tile::kStages>;

  static constexpr int kRowsOfThread = (Tile::kTokens + 127) / 128;      // of a record
  static constexpr int kPieces = Tile::kBlockK / Problem::kPieceValues;  // 16-byte pieces of a token's row in a k_block
  static constexpr int kRowStep = 128 / kPieces;                         // rows that the warpgroup copies at once
  static constexpr int kCopiedRows = (Tile::kTokens + kRowStep - 1) / kRowStep;  // of a thread
  static_assert(kCopiedRows <= 32, "one bit each");
  static_assert(kRowStep % 8 == 0, "the rows of a thread are swizzled alike");
  static constexpr bool kTakes = TokenTiles::kTaken;             // whether work tiles go to CTAs as they come to them
  static constexpr bool kForthAndBack = kAreRagged<TokenTiles>;  // whether turns of CTAs are

  // Work tiles go in bands of token tiles, column by column: neighbours share their weights.
  struct Place {
    int token_tile, column_tile;
  };
  static constexpr int kBand = band_of<typename Problem::T, Tile>();
  __device__ __forceinline__ static Place place_of(int work_tile, int tiles) {
    if constexpr (kBand == 1) return {work_tile / Shape::kColumnTiles, work_tile % Shape::kColumnTiles};
    const int first = work_tile / (kBand * Shape::kColumnTiles) * kBand, height = min(kBand, tiles - first);
    const int place = work_tile - first * Shape::kColumnTiles;
    return {first + place % height, place / height};
  }

  // While the kernel before finds out which slots an expert has: the CTA's first work tile will most likely be of this
  // expert, as nearly all of them have slots where these are many, and about as many token tiles. L2 fetches the first
  // k-blocks of its weights from a memory that has nothing else to do.
  static constexpr bool kFetchesAhead = TokenTiles::kNeedsPreviousKernel && kAscendExperts<TokenTiles> &&
                                        TokenTiles::kSlots >= 4 * TokenTiles::kExperts && !Problem::kTransposed;
  static constexpr int kFetched = KBlocks::kCount < 4 ? KBlocks::kCount : 4;  // k-blocks

  __device__ __forceinline__ static void fetch_ahead(const Gemm& gemm) {
    if constexpr (kFetchesAhead) {
      constexpr int kTokenTiles = (TokenTiles::kSlots + Tile::kTokens / 2) / Tile::kTokens;
      constexpr int kOfExpert = kTokenTiles > TokenTiles::kExperts ? kTokenTiles / TokenTiles::kExperts : 1;
      const auto [token_tile, column_tile] = place_of(blockIdx.x, TokenTiles::kMaxTiles);
      const int expert = token_tile / kOfExpert, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
      if (warp < 4 && token_tile % kOfExpert == 0 && expert < TokenTiles::kExperts && elect_lane()) {
        const typename Gemm::WeightCopies copies(gemm.operands, expert, column_tile, warp);
#pragma unroll 1
        for (int k_block = 0; k_block < kFetched; ++k_block) copies.fetch(k_block);
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ static void run(const Gemm& gemm, const Shared& shared, const Reader& token_tiles,
                                             int thread) {
    const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);  // known to be the same for the whole warp
    const bool elected = elect_lane();
    const uint64_t policy = keeps_weights<typename Problem::T, Tile>() ? evict_normal_policy() : evict_first_policy();
    const int tiles = token_tiles.count(), work_tiles = tiles * Shape::kColumnTiles;
    const int piece = thread % kPieces, first_row = thread / kPieces;
    const uint32_t first_target = piece / 8 * Storage::kSlabBytes + first_row * 128 + ((piece ^ first_row) % 8) * 16;
    Stage stage;
    Cursor<Storage::kRecords> record;

    // The next work tile's expert and slots are fetched a tile ahead.
    int next_work_tile = 0, turn = 0, next_expert = -1, next_shift = 0, next_slots[kRowsOfThread];
    const auto fetch = [&](int work_tile) {
      next_work_tile = work_tile;
      next_expert = -1;
      if constexpr (kIsByte<typename Problem::T>) {
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) next_slots[i] = -1;
      }
      if (work_tile >= work_tiles) return;
      const int token_tile = place_of(work_tile, tiles).token_tile;
      next_expert = token_tiles.expert(token_tile);
      next_shift = token_tiles.shift(token_tile);
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = thread + 128 * i;
        next_slots[i] = row < Tile::kTokens ? token_tiles.slot(token_tile, row) : -1;
      }
    };
    fetch(blockIdx.x);
    // Where tiles with most rows come first, turns go forth and back: who is the first in one round is the last in the
    // next.
    int place = blockIdx.x;
    const auto next_of = [&](int work_tile) {
      const int round = work_tile - place + gridDim.x;
      if constexpr (kForthAndBack) place = gridDim.x - 1 - place;
      return round + place;
    };
    // With rows of bytes, what the kernel before says of the next work tile's rows is fetched behind its slots.
    float2 factors[kRowsOfThread] = {};
    int factors_tile = -1;  // whose they are
    const auto factors_of = [&](int slot) {
      if constexpr (kIsByte<typename Problem::T>) {
        return slot >= 0 ? gemm.epilogue.both_factors(slot) : float2{0.0f, 0.0f};
      } else {
        return float2{0.0f, 0.0f};
      }
    };

    // Where CTAs take work tiles as they come to them, one thread asks for the next one when most of this one's
    // k-blocks are on their way, and the others read its number a k-block later.
    int taken = 0;
    const auto take = [&] {
      if constexpr (kTakes) {
        if (thread == 0) taken = token_tiles.take(work_tiles);
      }
    };
    const auto fetch_taken = [&] {
      if constexpr (kTakes) {
        if (thread == 0) token_tiles.shared_next[turn] = taken;
        named_barrier_sync<kNextWritten>(128);
        fetch(token_tiles.shared_next[turn]);
        turn ^= 1;  // a thread may still read the number while the next one is written
      }
    };
    constexpr int kTakenAt = KBlocks::kCount > 4 ? KBlocks::kCount - 4 : 0;  // k-blocks
    constexpr int kFetchedAt = KBlocks::kCount > 3 ? KBlocks::kCount - 3 : 0;
    constexpr int kFactorsAt = !kTakes ? 0 : KBlocks::kCount > 2 ? KBlocks::kCount - 2 : KBlocks::kCount - 1;

    constexpr int kPrefetched = Tile::kStages < KBlocks::kCount ? Tile::kStages : KBlocks::kCount;
    int prefetched = 0;  // k-blocks of the first work tile whose weights are on their way before its tokens exist
    bool waited = TokenTiles::kNeedsPreviousKernel;
#pragma unroll 1
    for (int work_tile = blockIdx.x; work_tile < work_tiles; work_tile = next_work_tile) {
      const int expert = __shfl_sync(~0u, next_expert, 0);  // known to be uniform
      const int shift = next_shift;
      int slots[kRowsOfThread];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) slots[i] = next_slots[i];
      if constexpr (!kTakes) {
        fetch(next_of(work_tile));
      } else if (expert < 0) {
        take();
        fetch_taken();
      }
      if (expert < 0) continue;
      const auto [token_tile, column_tile] = place_of(work_tile, tiles);

      // Where the weights are.
      const typename Gemm::WeightCopies copies(gemm.operands, expert, column_tile, warp);
      const auto copy_weights = [&](int s, int k_block) {
        if (elected) copies.copy(shared.weights(s), k_block, shared.full(s), policy);
      };
      if (!waited) {
#pragma unroll 1
        for (; prefetched < kPrefetched; ++prefetched) copy_weights(prefetched, prefetched);
        wait_for_previous_kernel();
        waited = true;
      }

      // Write the record.
      mbarrier_wait(shared.record_empty(record.at), record.parity ^ 1);
      Record& written = shared.record(record.at);
      int last = 0;
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = thread + 128 * i;
        if constexpr (TokenTiles::kMayRepeat) slots[i] = token_tiles.first_listed(slots[i], token_tile, row);
        const uint32_t real = __ballot_sync(~0u, slots[i] >= 0);
        if (real) last = 128 * i + 32 * warp + 32 - __clz(real);
        if (row < Tile::kTokens) {
          written.slots[row] = slots[i];
          if constexpr (kIsByte<typename Problem::T>) {
            if (factors_tile != work_tile) factors[i] = factors_of(slots[i]);
            written.factors[0][row] = factors[i].x, written.factors[1][row] = factors[i].y;
          } else {
            written.factors[0][row] = slots[i] >= 0 ? gemm.epilogue.factor(slots[i]) : 0.0f;
          }
        }
      }
      if (lane == 0) written.rows[warp] = last;
      if (thread == 0) written.expert = expert, written.column_tile = column_tile;
      named_barrier_sync<kRecordWritten>(128);
      // Where the tokens are.
      typename Shape::RowOffset offsets[kCopiedRows];  // of the rows of x that this thread copies, in pieces
      uint32_t real = 0;
#pragma unroll
      for (int i = 0; i < kCopiedRows; ++i) {
        const int row = first_row + i * kRowStep;
        const int slot = row < Tile::kTokens ? written.slots[row] : -1;
        offsets[i] =
            static_cast<typename Shape::RowOffset>(max(slot, 0) / Problem::kSlotsPerRow + (slot >= 0 ? shift : 0)) *
                (Problem::kRowStride / Problem::kPieceValues) +
            piece;
        if (slot >= 0) real |= 1u << i;
      }
      mbarrier_arrive(shared.record_full(record.at));
      record.advance();

      const float* scales_of_row = nullptr;  // of the row that this thread has in the record
      if constexpr (Storage::kRowGroups) {
        static_assert(Tile::kTokens <= 128, "a thread for each row");
        constexpr int kBytes = (KBlocks::kCount * 4 + 15) / 16 * 16;
        const int64_t row = max(slots[0], 0) / Problem::kSlotsPerRow + (slots[0] >= 0 ? shift : 0);
        scales_of_row = reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(gemm.operands.x) +
                                                       (row + 1) * Problem::kRowStride - kBytes);
      }

      // Fill the stages.
      const uint4* source = reinterpret_cast<const uint4*>(gemm.operands.x);
#pragma unroll 1
      for (int k_block = 0; k_block < KBlocks::kCount; ++k_block, source += kPieces) {
        mbarrier_wait(shared.empty(stage.at), stage.parity ^ 1);
        if (prefetched > 0) {
          --prefetched;
        } else {
          copy_weights(stage.at, k_block);
        }
        // A row that does not exist is not copied: it is multiplied in a column of its own, which is never stored.
        const uint32_t target = shared.tokens(stage.at) + first_target;
        const bool repeats = KBlocks::kMissingRows > 0 && k_block == KBlocks::kCount - 1;
        const uint4* first = repeats ? source - KBlocks::kMissingRows / Problem::kPieceValues : source;
#pragma unroll
        for (int i = 0; i < kCopiedRows; ++i) {
          if (!(real >> i & 1)) continue;
          if constexpr (KBlocks::kMissingRows == 0) {
            copy16(target + i * kRowStep * 128, first + offsets[i]);
          } else {
            copy16_or_zeros(target + i * kRowStep * 128, first + offsets[i],
                            !repeats || piece >= KBlocks::kMissingRows / Problem::kPieceValues);
          }
        }
        if constexpr (Storage::kRowGroups) {
          if (slots[0] >= 0) {
            copy_async<4>(shared.weights(stage.at) + Storage::kRowScalesAt + 4 * thread, scales_of_row + k_block);
          }
        }
        mbarrier_arrive_after_copies(shared.full(stage.at));
        stage.advance();
        if constexpr (kTakes) {
          if (k_block == kTakenAt) take();
          if (k_block == kFetchedAt) fetch_taken();
        }
        if constexpr (kIsByte<typename Problem::T>) {
          if (k_block == kFactorsAt) {
            factors_tile = next_work_tile;
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i) factors[i] = factors_of(next_slots[i]);
          }
        }
      }
      if constexpr (zero_stages<Shape>() > 0) {
        using Stages = WgmmaByteZeroStages<Shape>;
        const uint4* sums = reinterpret_cast<const uint4*>(gemm.operands.x) + Problem::kK / Problem::kPieceValues;
#pragma unroll 1
        for (int s = 0; s < Stages::kCount; ++s, sums += Stages::kPieces) {
          mbarrier_wait(shared.empty(stage.at), stage.parity ^ 1);
          if (elected) {
            copies.template copy_scales<Stages::kGroups>(shared.weights(stage.at), Stages::first_group(s),
                                                         shared.full(stage.at), policy);
          }
#pragma unroll
          for (int i = 0; i < kCopiedRows; ++i) {
            if (piece < Stages::kPieces && (real >> i & 1)) {
              copy16(shared.tokens(stage.at) + first_target + i * kRowStep * 128, sums + offsets[i]);
            }
          }
          mbarrier_arrive_after_copies(shared.full(stage.at));
          stage.advance();
        }
      }
    }
    // The last record.
    mbarrier_wait(shared.record_empty(record.at), record.parity ^ 1);
    if (thread == 0) shared.record(record.at).expert = -1;
    mbarrier_arrive(shared.record_full(record.at));
    wait_copies<0>();
  }
};

}  // namespace jmm
