// The shared memory of the wgmma kernel: a ring of stages, records of work tiles, partial sums and mbarriers.
#pragma once

#include "gemm/wgmma/tile.cuh"
#include "ptx/memory.cuh"

namespace jmm {

// A position in a ring and the parity of its round.
template <int kLength>
struct Cursor {
  int at = 0;
  uint32_t parity = 0;
  template <int kPlaces = 1>
  __device__ __forceinline__ void advance() {
    at += kPlaces % kLength;
    parity ^= kPlaces / kLength & 1;
    if (at >= kLength) at -= kLength, parity ^= 1;
  }
};

// docs/kernels.md, "The wgmma kernel", has the drawing.
template <class Shape>
struct WgmmaStorage {
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Zeros = typename Shape::Zeros;

  static constexpr int kSlabValues = 128 / sizeof(typename Shape::T);
  static constexpr int kSlabBytes = Tile::kTokens * 128;  // the tokens' rows of kSlabValues of K
  static constexpr int kStepBytes = Shape::kTileUnits * Shape::Packed::kBytes;
  static constexpr int kScaleUnits = Shape::kStageScaleUnits;

  struct TokenStage {
    unsigned char slabs[Tile::kBlockK / kSlabValues][kSlabBytes];  // 16-byte pieces of row r swizzled by r % 8
  };
  struct StageWithoutZeros {
    unsigned char packed[Shape::kStageTiles * Shape::Packed::kBytes];
    unsigned char scales[kScaleUnits * kUnitColumns * Shape::Scales::kBytes];
  };
  struct StageWithZeros : StageWithoutZeros {
    unsigned char zeros[kScaleUnits * (Zeros::kStored ? Zeros::kUnitBytes : 1)];
  };
  using StageOfWeights = typename Select<Zeros::kStored, StageWithZeros, StageWithoutZeros>::Type;
  struct StageWithRowScales : StageOfWeights {
    float row_scales[Tile::kTokens];  // of the k-block
  };
  static constexpr bool kRowGroups = has_row_groups<typename Shape::Problem>();
  using WeightStage = typename Select<kRowGroups, StageWithRowScales, StageOfWeights>::Type;

  static constexpr int kFactors = kIsByte<typename Shape::T> ? 2 : 1;
  // What the consumers need to know about a work tile.
  struct Record {
    int expert;                              // -1 after the last work tile
    int column_tile;                         // of the product
    int rows[4];                             // the tile's last real row + 1 is the largest of these
    int slots[Tile::kTokens];                // -1 where the row is padding
    float factors[kFactors][Tile::kTokens];  // of the rows
  };
  static constexpr int kRecords = 2;
  static_assert(sizeof(WeightStage) % 16 == 0 && sizeof(Record) % 8 == 0, "stages and barriers are aligned");

  struct Rings {
    TokenStage tokens[Tile::kStages];
    WeightStage weights[Tile::kStages];
    Record records[kRecords];
  };
  // Sums of all but the first of the warpgroups that share K.
  struct RingsAndPartials : Rings {
    float partials[(Tile::kWarpgroupsK > 1 ? Tile::kWarpgroupsK - 1 : 1) * Tile::kWarpgroupsN][Shape::kThreadSums][128];
  };
  using Data = typename Select<(Tile::kWarpgroupsK > 1), RingsAndPartials, Rings>::Type;
  struct alignas(16) Bytes : Data {
    uint64_t full[Tile::kStages], empty[Tile::kStages];
    uint64_t record_full[kRecords], record_empty[kRecords];
  };

  // Sums of sizes: not every NVRTC has offsetof.
  static constexpr int kWeightsAt = sizeof(Rings::tokens);
  static constexpr int kRecordsAt = kWeightsAt + sizeof(Rings::weights);
  static_assert(kRecordsAt + sizeof(Rings::records) == sizeof(Rings), "nothing lies between the members");
  static constexpr int kPartialsAt = sizeof(Rings);
  static constexpr int kBarriersAt = sizeof(Data);
  static constexpr int kScalesAt = sizeof(StageWithoutZeros::packed);
  static constexpr int kZerosAt = sizeof(StageWithoutZeros), kRowScalesAt = sizeof(StageOfWeights);
  static constexpr int kTokenTilesAt = sizeof(Bytes);  // the table of grouped token tiles
  static constexpr int kSharedBytes = kTokenTilesAt + Shape::TokenTiles::kSharedBytes;
  static_assert(Shape::TokenTiles::kScratchBytes <= kRecordsAt, "the ring lends its memory before it is filled");
  static_assert(kBarriersAt % 8 == 0, "mbarriers are aligned");
};

// Addresses of the storage.
template <class Shape>
struct WgmmaShared {
  using Storage = WgmmaStorage<Shape>;
  using Record = typename Storage::Record;
  static constexpr int kStages = Shape::Tile::kStages;
  static constexpr int kTokenBytes = sizeof(typename Storage::TokenStage);
  static constexpr int kWeightBytes = sizeof(typename Storage::WeightStage);
  unsigned char* const bytes;
  const uint32_t base;

  __device__ __forceinline__ explicit WgmmaShared(unsigned char* b) : bytes(b), base(smem_address(b)) {}
  __device__ __forceinline__ uint32_t tokens(int stage) const { return base + stage * kTokenBytes; }
  __device__ __forceinline__ uint32_t weights(int stage) const {
    return base + Storage::kWeightsAt + stage * kWeightBytes;
  }
  __device__ __forceinline__ Record& record(int r) const {
    return reinterpret_cast<Record*>(bytes + Storage::kRecordsAt)[r];
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + Storage::kBarriersAt + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t record_full(int r) const { return full(2 * kStages + r); }
  __device__ __forceinline__ uint32_t record_empty(int r) const { return full(2 * kStages + Storage::kRecords + r); }
};

}  // namespace jmm
