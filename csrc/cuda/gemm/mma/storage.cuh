// The shared memory of the mma.sync kernel, and how stages are laid out so that no two lanes conflict.
#pragma once

#include "gemm/mma/tile.cuh"
#include "ptx/memory.cuh"

namespace jmm {

// Every warp has a ring of weights, and the warps that share a part of K one of tokens (docs/kernels.md, "The mma.sync
// kernel", has the drawing).
template <class Shape>
struct MmaStorage {
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Packed = typename Shape::Packed;
  using Scales = typename Shape::Scales;
  using Zeros = typename Shape::Zeros;

  static constexpr int kStepBytes = Tile::kUnits * Packed::kBytes;  // packed weights of 16 rows of K
  static constexpr int kUnitScaleBytes = kUnitColumns * Scales::kBytes;
  static constexpr int kScaleRowUnits = KBlocks::kScaleRows * Tile::kUnits;

  struct StageWithoutZeros {
    unsigned char packed[KBlocks::kSteps * kStepBytes];
    unsigned char scales[kScaleRowUnits * kUnitScaleBytes];
  };
  struct StageWithZeros : StageWithoutZeros {
    unsigned char zeros[kScaleRowUnits * (Zeros::kStored ? Zeros::kUnitBytes : 1)];
  };
  using WeightStage = typename Select<Zeros::kStored, StageWithZeros, StageWithoutZeros>::Type;
  struct TokenStage {
    typename Shape::T rows[Tile::kTokens][Tile::kBlockK];  // in 16-byte pieces, swizzled
  };
  static_assert(sizeof(WeightStage) % 16 == 0 && sizeof(TokenStage) % 16 == 0, "stages are aligned for 16-byte copies");

  struct Rings {
    WeightStage weights[Tile::kWarps][Tile::kStages];
    TokenStage tokens[Tile::kWarpsK][Tile::kStages];
  };
  struct RingsAndPartials : Rings {
    float4 partials[Tile::kWarpsK][Shape::kSumFragments][32];  // of each lane
  };
  using Bytes = typename Select<Shape::kExchanges, RingsAndPartials, Rings>::Type;
  static_assert(Shape::TokenTiles::kScratchBytes <= sizeof(Bytes),
                "the rings lend their memory before they are filled");

  // Sums of sizes: not every NVRTC has offsetof.
  static constexpr int kScalesAt = sizeof(StageWithoutZeros::packed);
  static constexpr int kZerosAt = sizeof(StageWithoutZeros);
  static constexpr int kTokensAt = sizeof(Rings::weights);
  static_assert(kTokensAt + sizeof(Rings::tokens) == sizeof(Rings), "nothing lies between the members");
  static constexpr int kPartialsAt = sizeof(Rings);
  static constexpr int kTokenTilesAt = sizeof(Bytes);  // the table of grouped token tiles
  static constexpr int kSharedBytes = kTokenTilesAt + Shape::TokenTiles::kSharedBytes;

  // Where a piece of a token's row lies in a stage. The 8 rows that ldmatrix reads at once fall into 8 different groups
  // of 4 banks.
  __device__ __forceinline__ static int token_piece(int row, int piece) {
    const int linear = row * Shape::kPieces + piece;
    return 16 * (linear ^ (Shape::kPieces > 8 ? row % 8 : linear / 8 % Shape::kPieces));
  }
};

// The rings that a warp works with.
template <class Shape>
struct MmaRings {
  using Storage = MmaStorage<Shape>;
  static constexpr int kWeightStage = sizeof(typename Storage::WeightStage);
  static constexpr int kTokenStage = sizeof(typename Storage::TokenStage);
  const uint32_t weight_ring, token_ring;

  __device__ __forceinline__ MmaRings(unsigned char* shared_bytes, int warp, int warp_k)
      : weight_ring(smem_address(shared_bytes) + warp * (Shape::Tile::kStages * kWeightStage)),
        token_ring(smem_address(shared_bytes) + Storage::kTokensAt + warp_k * (Shape::Tile::kStages * kTokenStage)) {}
  __device__ __forceinline__ uint32_t weights(int stage) const { return weight_ring + stage * kWeightStage; }
  __device__ __forceinline__ uint32_t tokens(int stage) const { return token_ring + stage * kTokenStage; }
};

}  // namespace jmm
