// Rows of 8 bits on wgmma: which columns a lane has, and from packed weights to the fragments of a slab and its scales.
#pragma once

#include "gemm/named_barriers.cuh"
#include "gemm/wgmma/weights.cuh"
#include "ptx/hopper.cuh"
#include "ptx/memory.cuh"
#include "weights/fragments_bytes.cuh"

namespace jmm {

template <class Problem, class Tile, class TokenTiles, class Epilogue>
struct WgmmaByteShape : WgmmaWorkTiles<Problem, Tile, TokenTiles, Epilogue> {
  using typename WgmmaWorkTiles<Problem, Tile, TokenTiles, Epilogue>::Zeros;
  using Code = typename Problem::Code;
  using Codes = ByteFragments<Code, typename Problem::T>;
  static constexpr bool kScalesSums = false, kTwoSums = true, kTakesTurns = false;
  static_assert(Zeros::kWhole && !Problem::kGlobalScales, "zero points are whole, scales are those of groups");
  static_assert(Tile::kBlockK == 128 && Tile::kWarpgroupsK == 1, "a k-block is a slab of x, and its sums are");
  static_assert(Tile::kSubTiles % 2 == 0, "two sets of fragments take turns");
  // Groups that a k-block has scales of: one, unless they are smaller. Their rows are those of whole instructions.
  static constexpr int kScaleRows = WgmmaWorkTiles<Problem, Tile, TokenTiles, Epilogue>::KBlocks::kScaleRows;
  static constexpr bool kFolds = Codes::kFolds;               // whether weights take in what scales differ by
  static constexpr int kSumGroups = kFolds ? 1 : kScaleRows;  // of a k-block, with sums of their own
  static_assert(Problem::kGroups == 1 || Problem::kGroup % 128 == 0 ||
                    (kScaleRows * Problem::kGroup == 128 && Problem::kGroup % 32 == 0 &&
                     Problem::kK % Problem::kGroup == 0),
                "a k-block is part of one group, or whole groups");
  static_assert(!kFolds || (Problem::kGroup == 32 && kSame<typename Problem::Scale, E8M0Scale>),
                "an instruction has the rows of one group, whose scale is a power of two");
  static_assert(Problem::kK >= 128 && Problem::kK % 32 == 0, "K is k-blocks, of whole fragments");
  static_assert(Problem::kRowStride % 16 == 0, "rows are whole pieces");
};

// The columns of a lane. Any columns may be rows of a fragment: those of a unit are dealt out so that no two lanes read
// the same bank, and that what a lane has of a row lies side by side in the order of a unit's scales: eight columns
// r, r + 8, r + 16 ... for each r below 8.
template <class Shape>
struct WgmmaByteColumns {
  static constexpr int kSubTiles = Shape::kWarpSubTiles;  // of a unit: 1, 2 or 4, with 16 columns each
  static_assert(kSubTiles == 1 || kSubTiles == 2 || kSubTiles == 4, "a unit is that of four, two warps or one");

  const int r;           // the columns' number modulo 8
  const int first;       // of those, where this lane's begin: two for each sub-tile
  const bool exchanged;  // whether the lane's two sub-tiles are the other way round

  __device__ __forceinline__ explicit WgmmaByteColumns(const WgmmaLane<Shape>& lane)
      : r(kSubTiles == 4   ? lane.lane / 4
          : kSubTiles == 2 ? lane.warp % 2 * 4 + lane.lane / 8
                           : lane.warp * 2 + lane.lane / 16),
        first(kSubTiles == 4   ? 0
              : kSubTiles == 2 ? lane.lane / 4 % 2 * 4
                               : lane.lane / 4 % 4 * 2),
        exchanged(kSubTiles == 2 && (Shape::Code::kBits == 4 ? lane.lane / 16 : lane.lane / 8 % 2)) {}

  // The lane whose words this one reads, and which of its sub-tiles.
  __device__ __forceinline__ int source(const WgmmaLane<Shape>& lane) const { return 4 * r + lane.lane % 4; }
  __device__ __forceinline__ int word(int p) const { return first / 2 + (p ^ int(exchanged)); }
};

// Keeps what follows in the program behind the products that were committed: ptxas would put the making of fragments
// among them, and the tensor cores would wait.
__device__ __forceinline__ void issue_products() { __syncwarp(); }

template <class Shape>
struct WgmmaByteWeights {
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using Packed = typename Shape::Packed;
  using Codes = typename Shape::Codes;
  using Scales = typename Shape::Scales;
  using Storage = WgmmaStorage<Shape>;
  using Lane = WgmmaLane<Shape>;
  static constexpr float kResidualScale = 1.0f / (Codes::kFactor * Scales::kFactor);
  static constexpr int kFragments = Tile::kBlockK / 32;
  static constexpr int kWords = Packed::kSubTileWords;
  // Of a slab, which is a sub-tile of each warp, and a group of a k-block.
  static constexpr int kGroupFragments = kFragments / Shape::kSumGroups;
  using Fragments = uint32_t[kGroupFragments][4];

  // What is known of fragments beside them.
  struct Plain {};
  struct Folded {
    uint32_t largest;  // exponents of the largest scales of this lane's two columns, 16 bits each
    bool apart;        // whether the scales of some column of the warpgroup's are too far apart
  };
  using Made = typename Select<Shape::kFolds, Folded, Plain>::Type;

  // The fragments of slab j and a group.
  __device__ __forceinline__ static Made make(Fragments& a, uint32_t weights, int j, int group, const Lane& lane) {
    const uint32_t source = words_at(weights, j, lane);
    Made made;
    if constexpr (Shape::kFolds) {
      uint32_t exponents[4];
#pragma unroll
      for (int f = 0; f < 4; ++f) exponents[f] = exponents_of(weights, j, f, lane);
      const uint32_t largest = __vmaxu2(__vmaxu2(exponents[0], exponents[1]), __vmaxu2(exponents[2], exponents[3]));
      const uint32_t least = __vminu2(__vminu2(exponents[0], exponents[1]), __vminu2(exponents[2], exponents[3]));
      constexpr uint32_t kBoth = 0x00010001;
      made.largest = largest;
      made.apart = any_of_warpgroup(kWarpgroupAgrees + lane.warpgroup,
                                    (largest - least + (0x7FFF - Codes::kRange) * kBoth & 0x8000 * kBoth) != 0);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        uint32_t first[kWords], second[kWords];
        load_words(first, second, source, f);
        Codes::fragment(first, second, a[f], exponents[f] + Codes::kMost * kBoth - largest);
      }
    } else {
#pragma unroll
      for (int f = 0; f < kGroupFragments; ++f) {
        uint32_t first[kWords], second[kWords];
        load_words(first, second, source, group * kGroupFragments + f);
        Codes::fragment(first, second, a[f]);
      }
    }
#pragma unroll
    for (int f = 0; f < kGroupFragments; ++f) wgmma_operand_ready(a[f]);
    return made;
  }

  // Where a lane's words of slab j begin, and those of steps 2 f and 2 f + 1.
  __device__ __forceinline__ static uint32_t words_at(uint32_t weights, int j, const Lane& lane) {
    const int h = j / Shape::kWarpSubTiles, p = j % Shape::kWarpSubTiles;
    const WgmmaByteColumns<Shape> columns(lane);
    return weights + lane.unit(h) * Packed::kBytes + columns.source(lane) * Packed::kLaneBytes +
           columns.word(p) * kWords * 4;
  }
  __device__ __forceinline__ static void load_words(uint32_t (&first)[kWords], uint32_t (&second)[kWords],
                                                    uint32_t source, int f) {
    load_shared_words(first, source + 2 * f * Storage::kStepBytes);
    load_shared_words(second, source + (2 * f + 1) * Storage::kStepBytes);
  }

  // Where the scales of slab j are, of this lane's two columns, in a group of the k-block.
  __device__ __forceinline__ static uint32_t scales_at(uint32_t weights, int j, int group, const Lane& lane) {
    const int h = j / Shape::kWarpSubTiles, p = j % Shape::kWarpSubTiles;
    const WgmmaByteColumns<Shape> columns(lane);
    return weights + Storage::kScalesAt +
           ((group * Shape::kTileUnits + lane.unit(h)) * kUnitColumns + columns.r * 8 + columns.word(p) * 2) *
               Scales::kBytes;
  }
  __device__ __forceinline__ static void load_scales(float (&values)[2], uint32_t weights, int j, int group,
                                                     const Lane& lane) {
    ColumnScales<typename Problem::Scale, 2> scales;
    scales.load(scales_at(weights, j, group, lane));
    values[0] = scales.exact(0), values[1] = scales.exact(1);
  }
  // Those of E8M0, 16 bits each.
  __device__ __forceinline__ static uint32_t exponents_of(uint32_t weights, int j, int group, const Lane& lane) {
    return __byte_perm(load_shared2(scales_at(weights, j, group, lane)), 0, 0x4140);
  }

  // Adds a slab's sums of the k-block, scaled, to those of the tile.
  template <class Sum, int kSums>
  __device__ __forceinline__ static void close(float (&sums)[kSums], const Sum (&part)[kSums],
                                               const float (&scales)[2]) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s] = fmaf(static_cast<float>(part[s]), scales[s / 2 % 2], sums[s]);
  }
  // The same where each row has a scale for the k-block. Returns bits of all that it has loaded.
  template <class Sum, int kSums>
  __device__ __forceinline__ static uint32_t close_rows(float (&sums)[kSums], const Sum (&part)[kSums],
                                                        const float (&scales)[2], uint32_t weights, const Lane& lane) {
    const uint32_t rows = weights + Storage::kRowScalesAt + lane.lane % 4 * 8;
    uint32_t loaded = 0;
#pragma unroll
    for (int t = 0; t < kSums / 4; ++t) {
      uint32_t of_rows[2];
      load_shared_words(of_rows, rows + 32 * t);
      loaded |= of_rows[0] | of_rows[1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = 4 * t + i;
        sums[s] = fmaf(static_cast<float>(part[s]) * __uint_as_float(of_rows[i % 2]), scales[i / 2], sums[s]);
      }
    }
    return loaded;
  }
};

}  // namespace jmm
