// Grouped GEMM over packed experts on mma.sync, for few token rows per expert (docs/kernels.md, "The mma.sync kernel").
//
// The weights are the A operand (16 columns of W by 16 of K, straight from Marlin's packing), the tokens the B operand,
// 8 at a time: a token tile costs no more than it has rows. Each warp runs its own pipeline: it copies its columns over
// its share of K through a ring that no other warp touches; the warps that share a part of K share the ring of its
// tokens and synchronise once per k-block. The grid is persistent, and the rings run on across work tiles: the next
// tile's weights are on their way while this one's sums are exchanged and stored. With three stages:
//
//   k-block              0          1          2          3          4
//   cp.async wait        |          |          |          |          |
//   named barrier        |          |          |          |          |
//   start copy of      2 -> s2    3 -> s0    4 -> s1    5 -> s2    6 -> s0
//   ldmatrix, mma       (s0)       (s1)       (s2)       (s0)       (s1)
//   group closes                               *                     *
#pragma once

#include "epilogue.cuh"
#include "gemm/mma/exchange.cuh"
#include "gemm/mma/loader.cuh"
#include "gemm/mma/multiplier.cuh"
#include "gemm/mma/multiplier_bytes.cuh"
#include "ptx/copies.cuh"
#include "ptx/numbers.cuh"
#include "ptx/synchronization.cuh"
#include "token_tiles.cuh"

namespace jmm {

template <class Problem, class Tile, class TokenTiles, class Epilogue>
struct GroupedGemm {
  using Shape = MmaShape<Problem, Tile, TokenTiles, Epilogue>;
  using Storage = MmaStorage<Shape>;
  using Multiplier =
      typename Select<kIsByte<typename Problem::T>, MmaByteMultiplier<Shape>, MmaMultiplier<Shape>>::Type;
  using RowOffset = typename Shape::RowOffset;
  using ScaleElement = typename Problem::ScaleElement;
  using ZeroElement = typename Problem::ZeroElement;
  static constexpr int kSharedBytes = Storage::kSharedBytes;
  static constexpr int kThreads = Tile::kThreads, kCtasPerSm = Tile::kCtasPerSm, kCluster = Tile::kCluster;
  static constexpr int64_t kWorkTiles = Shape::kWorkTiles, kMaxCtas = Shape::kMaxCtas;

  Operands<Problem> operands;
  TokenTiles token_tiles;
  Epilogue epilogue;

  __device__ void run(unsigned char* shared_bytes) const {
    // Kept in registers: the compiler would rather read the thread's index again for each k-block.
    const int warp = opaque(threadIdx.x / 32), lane = opaque(threadIdx.x % 32);
    const int warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;
    const MmaRings<Shape> rings(shared_bytes, warp, warp_k);

    // Find the work.
    if constexpr (TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
    allow_next_kernel();
    const typename Shape::Reader reader(token_tiles, shared_bytes + Storage::kTokenTilesAt, shared_bytes);
    clear_gaps<kThreads, TokenTiles>(reader, epilogue);
    const int work_tiles = reader.count() * Shape::kColumnTiles;
    const int share = Shape::cta_of_cluster() * Tile::kWarpsK + warp_k;  // of K
    const int k_blocks = Shape::k_blocks_of(share);

    // Fill all stages but one. Weights do not depend on the kernel before; tokens may.
    MmaLoader<Shape> loader(operands, reader, warp_n, share, lane, work_tiles);
    constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s < k_blocks) loader.load_weights(rings.weights(s), s);
    }
    if constexpr (Shape::kAsksTogether) loader.find_rows();
    if constexpr (!TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s >= k_blocks) loader.load_weights(rings.weights(s), 0);
      loader.load_scales(rings.weights(s));
      loader.load_tokens(rings.tokens(s));
      loader.advance();
      commit_copies();
    }

    Multiplier multiplier(lane);
    int stage = 0;
    for (int work_tile = Shape::first_work_tile(); work_tile < work_tiles; work_tile += Shape::work_tile_stride()) {
      multiplier.begin_tile();
      const MmaRows<Shape> rows(operands, epilogue, loader, work_tile, warp_n, lane);  // fetched now, wanted at the end
      int rows_left = Problem::kGroup - Shape::first_row(share) % Problem::kGroup;     // of K, in the current group
#pragma unroll 1
      for (int k_block = 0; k_block < k_blocks; ++k_block) {
        // Load: refill the stage that was consumed last.
        wait_copies<kAhead - 1>();
        sync_part<Shape>(warp_k);  // everybody's copies have arrived, and nobody reads the stage that is filled next
        const int free = stage == 0 ? kAhead : stage - 1;
        loader.load_weights(rings.weights(free), 0);
        loader.load_scales(rings.weights(free));
        loader.load_tokens(rings.tokens(free));
        loader.advance();
        commit_copies();
        // Dequantise and multiply.
        rows_left -= Tile::kBlockK;
        multiplier.multiply(rows.token_fragments, rows.sides, rings.weights(stage), rings.tokens(stage),
                            rows_left <= 0 || k_block == k_blocks - 1, Shape::is_short(share, k_block));
        if (rows_left <= 0) rows_left = Problem::kGroup;
        stage = stage == kAhead ? 0 : stage + 1;
      }
      // Epilogue.
      if constexpr (Shape::kMostSides > 1) multiplier.join_sides(rows.sides);
      apply_factors<Shape>(multiplier.sums, rows.global_scales);
      MmaExchange<Shape>::finish(epilogue, shared_bytes, work_tile, rows, warp, warp_n, warp_k, lane, multiplier.sums);
    }
    wait_copies<0>();
    if constexpr (Tile::kCluster > 1) cluster_sync();  // nobody reads this CTA's shared memory any more
  }
};

}  // namespace jmm
