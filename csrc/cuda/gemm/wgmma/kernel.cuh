// Grouped GEMM over packed experts on Hopper's wgmma, for 8 to 288 rows per token tile (docs/kernels.md, "The wgmma
// kernel").
//
// The weights are the A operand, from registers: Marlin's order makes a word of a lane its fragment of m64k16, warp by
// warp (docs/kernels.md, "From words to fragments"). The tokens are the B operand, from shared memory. One producer
// warpgroup walks the work tiles ahead of the others, fills the stages of a ring and leaves a record about each tile.
// The consumer warpgroups lie side by side along the columns, or share K: each dequantises the next steps while its
// products of the last ones run. The grid is persistent, so the ring fills for the next work tile while this one is
// stored.
#pragma once

#include "epilogue.cuh"
#include "gemm/wgmma/mainloop.cuh"
#include "gemm/wgmma/producer.cuh"
#include "gemm/wgmma/transposed.cuh"
#include "ptx/hopper.cuh"
#include "ptx/synchronization.cuh"
#include "token_tiles.cuh"

namespace jmm {

template <class Problem, class Tile, class TokenTiles, class Epilogue>
struct WgmmaShapeOf {
  using OfRows = typename Select<kIsByte<typename Problem::T>, WgmmaByteShape<Problem, Tile, TokenTiles, Epilogue>,
                                 WgmmaShape<Problem, Tile, TokenTiles, Epilogue>>::Type;
  using Type =
      typename Select<Problem::kTransposed, WgmmaTransposedShape<Problem, Tile, TokenTiles, Epilogue>, OfRows>::Type;
};

template <class Problem, class Tile, class TokenTiles, class Epilogue>
struct WgmmaGroupedGemm {
  using Shape = typename WgmmaShapeOf<Problem, Tile, TokenTiles, Epilogue>::Type;
  using WeightsOfRows =
      typename Select<kIsByte<typename Problem::T>, WgmmaByteWeights<Shape>, WgmmaWeights<Shape>>::Type;
  using Weights = typename Select<Problem::kTransposed, WgmmaTransposedWeights<Shape>, WeightsOfRows>::Type;
  using WeightCopies =
      typename Select<Problem::kTransposed, WgmmaTransposedCopies<Shape>, WgmmaWeightCopies<Shape>>::Type;
  using Storage = WgmmaStorage<Shape>;
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
    const WgmmaShared<Shape> shared(shared_bytes);
    if (threadIdx.x == 0) {
      for (int s = 0; s < Tile::kStages; ++s) {
        mbarrier_init(shared.full(s), 128);                      // the producer's threads
        mbarrier_init(shared.empty(s), 4 * Tile::kWarpgroupsN);  // the warps that read the stage
      }
      for (int r = 0; r < Storage::kRecords; ++r) {
        mbarrier_init(shared.record_full(r), 128);
        mbarrier_init(shared.record_empty(r), 4 * Tile::kWarpgroups);
      }
    }

    // Find the work.
    WgmmaProducer<WgmmaGroupedGemm>::fetch_ahead(*this);
    if constexpr (TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
    allow_next_kernel();
    const typename Shape::Reader reader(token_tiles, shared_bytes + Storage::kTokenTilesAt, shared_bytes);
    clear_gaps<kThreads, TokenTiles>(reader, epilogue);
    fence_async_proxy();  // bulk copies see the barriers, and the ring that was lent
    __syncthreads();

    if (threadIdx.x >= 128 * Tile::kWarpgroups) {
      // The producer warpgroup.
      if constexpr (Shape::kMovesRegisters) setmaxnreg_dec<Tile::kProducerRegisters>();
      WgmmaProducer<WgmmaGroupedGemm>::run(*this, shared, reader, threadIdx.x - 128 * Tile::kWarpgroups);
    } else {
      // The consumer warpgroups.
      if constexpr (Shape::kMovesRegisters) setmaxnreg_inc<Tile::kConsumerRegisters>();
      if constexpr (!TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
      WgmmaConsumer<WgmmaGroupedGemm>::run(*this, shared);
    }
  }
};

}  // namespace jmm
