// The product with rows of 8 bits on wgmma: what differs from rows of 16 (docs/kernels.md, "8-bit activations").
//
// Sums of a k-block of 128 rows are made slab by slab, 64 columns of a warpgroup at a time: one slab's sums of the
// k-block and all sums of the tile are what registers have room for. A slab's sums are scaled, in float32, into those
// of the tile while the tensor cores work for the other warpgroup.
#pragma once

#include "gemm/named_barriers.cuh"
#include "gemm/wgmma/weights.cuh"
#include "gemm/wgmma/zero_stages.cuh"
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

// Gemm is the kernel, Consumer its WgmmaConsumer.
template <class Gemm, class Consumer>
struct WgmmaByteZeros {
  using Shape = typename Gemm::Shape;
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using Zeros = typename Shape::Zeros;
  using Scale = typename Problem::Scale;
  using Stages = WgmmaByteZeroStages<Shape>;
  using Shared = WgmmaShared<Shape>;
  using Lane = WgmmaLane<Shape>;
  using Record = typename WgmmaStorage<Shape>::Record;
  using Stage = Cursor<Tile::kStages>;
  // A power of two times a bfloat16 number is one.
  static constexpr bool kSplitsScales = Zeros::kStored || !kSame<Scale, BFloat>;

  __device__ __forceinline__ static uint32_t pair(float first, float second) {
    return from_float<BFloat>(first) | uint32_t(from_float<BFloat>(second)) << 16;
  }
  __device__ __forceinline__ static float rest(float value) {
    return value - to_float<BFloat>(from_float<BFloat>(value));
  }

  // Less the zero point times the scale, of this lane's two columns of slab j, in a k-block.
  __device__ __forceinline__ static void scaled_zeros(float (&values)[2], const Gemm& gemm, const Record& record,
                                                      uint32_t scales_at, int first_group, int j, int k_block,
                                                      const Lane& lane) {
    const WgmmaByteColumns<Shape> columns(lane);
    const int h = j / Shape::kWarpSubTiles, word = columns.word(j % Shape::kWarpSubTiles), r = columns.r;
    const int group = Stages::group_of(k_block);
    float zeros[2] = {Zeros::kBaked, Zeros::kBaked};
    if constexpr (Zeros::kStored) {
      const ExpertArray<Problem, unsigned char> stored(gemm.operands.zeros, gemm.operands.shared_zeros, record.expert);
      constexpr int kWords = Problem::Code::kBits / 4;
      const int64_t row = int64_t(stored.expert) * Problem::kGroups + group;
      const int unit = Shape::packed_unit(record.column_tile, lane.unit(h));
      const uint32_t* words = reinterpret_cast<const uint32_t*>(stored.elements) +
                              (row * Problem::kUnits + unit) * (8 * kWords) + r * kWords;
      Zeros of_unit;
#pragma unroll
      for (int i = 0; i < kWords; ++i) of_unit.words[i] = words[i];
#pragma unroll
      for (int b = 0; b < 2; ++b) zeros[b] = of_unit[2 * word + b];
    }
    ColumnScales<Scale, 2> scales;
    scales.load(scales_at + (group - first_group) * Stages::kGroupBytes +
                (lane.unit(h) * kUnitColumns + r * 8 + 2 * word) * Shape::Scales::kBytes);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      values[b] = -Shape::Codes::kFactor * (zeros[b] - Shape::Codes::kOffset) * scales.exact(b);
    }
  }

  // Slab by slab, as the product is: sums over as many stages as the ring can spare, in the registers of a k-block's.
  template <int kN>
  __device__ __forceinline__ static void add(const Gemm& gemm, const Shared& shared, const Record& record,
                                             const Lane& lane, Stage stage, float (&sums)[Tile::kSubTiles][kN / 2]) {
    constexpr int kMost = Tile::kStages / 2, kHeld = Stages::kCount < kMost ? Stages::kCount : kMost;
    int first = 0;
#pragma unroll 1
    for (; first + kHeld <= Stages::kCount; first += kHeld) {
      add_stages<kN, kHeld>(gemm, shared, record, lane, first, stage, sums);
    }
    if constexpr (Stages::kCount % kHeld > 0) {
      add_stages<kN, Stages::kCount % kHeld>(gemm, shared, record, lane, first, stage, sums);
    }
  }

 private:
  struct Fragments {
    uint32_t high[4], low[4];  // low parts if kSplitsScales
  };

  // The A fragment of slab j in stage s: two k-blocks in a register.
  __device__ __forceinline__ static void make(Fragments& a, const Gemm& gemm, const Record& record, uint32_t scales_at,
                                              int s, int j, const Lane& lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k_block = 16 * s + 8 * half + 2 * (lane.lane % 4);
      float first[2], second[2];
      scaled_zeros(first, gemm, record, scales_at, Stages::first_group(s), j, k_block, lane);
      scaled_zeros(second, gemm, record, scales_at, Stages::first_group(s), j, k_block + 1, lane);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        a.high[2 * half + b] = pair(first[b], second[b]);
        if constexpr (kSplitsScales) a.low[2 * half + b] = pair(rest(first[b]), rest(second[b]));
      }
    }
    wgmma_operand_ready(a.high);
    if constexpr (kSplitsScales) wgmma_operand_ready(a.low);
  }

  template <int kN, int kHere>
  __device__ __forceinline__ static void add_stages(const Gemm& gemm, const Shared& shared, const Record& record,
                                                    const Lane& lane, int first, Stage& stage,
                                                    float (&sums)[Tile::kSubTiles][kN / 2]) {
    using Product = Wgmma<BFloat, kN>;
    constexpr int kLow = 32;  // bytes of a row from high parts to low ones
    constexpr int kProducts = Tile::kSubTiles * kHere;
    int places[kHere];
#pragma unroll
    for (int s = 0; s < kHere; ++s) {
      Consumer::acquire(shared, stage);
      places[s] = stage.at;
      stage.advance();
    }
    float part[kN / 2];
    Fragments a[2];  // being made, and in use
    make(a[0], gemm, record, shared.weights(places[0]), first, 0, lane);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int j = i / kHere, s = i % kHere, next = i + 1;
      const WgmmaRows row_sums(shared.tokens(places[s]));
      wgmma_fence();
      Product::run(part, a[i % 2].high, row_sums.at(0), s > 0);
      Product::run(part, a[i % 2].high, row_sums.at(kLow), true);
      if constexpr (kSplitsScales) Product::run(part, a[i % 2].low, row_sums.at(0), true);
      wgmma_commit();
      issue_products();
      if (next < kProducts) {
        wgmma_wait<1>();  // the fragment before is free
        make(a[next % 2], gemm, record, shared.weights(places[next % kHere]), first + next % kHere, next / kHere, lane);
      }
      if (s + 1 == kHere) {
        wgmma_wait<0>();
#pragma unroll
        for (int t = 0; t < kN / 2; ++t) sums[j][t] += part[t];
      }
    }
#pragma unroll
    for (int s = 0; s < kHere; ++s) Consumer::release(shared, places[s], lane, 0);  // all that was loaded is in use
  }
};

// Gemm is the kernel, Consumer its WgmmaConsumer.
template <class Gemm, class Consumer>
struct WgmmaByteProduct {
  using Shape = typename Gemm::Shape;
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Weights = typename Gemm::Weights;
  using Zeros = WgmmaByteZeros<Gemm, Consumer>;
  using Shared = WgmmaShared<Shape>;
  using Record = typename WgmmaStorage<Shape>::Record;
  using Lane = WgmmaLane<Shape>;
  using Stage = Cursor<Tile::kStages>;
  static constexpr int kGroups = Shape::kSumGroups, kGroupFragments = Weights::kGroupFragments;
  static_assert(Shape::kScaleRows == 1 || !(Zeros::Stages::kAny || WgmmaStorage<Shape>::kRowGroups),
                "zero points and scales of rows are those of k-blocks");

  template <int kN>
  __device__ __forceinline__ static void run(const Gemm& gemm, const Shared& shared, const Record& record,
                                             const Lane& lane, Stage stage, float (&sums)[Tile::kSubTiles][kN / 2]) {
    constexpr int kCount = Tile::kSubTiles * kGroups;
    typename Shape::T::Sum part[kN / 2];  // of a slab and a group of a k-block
    typename Weights::Fragments a[2];     // weights: being made, and in use
#pragma unroll
    for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) sums[j][i] = 0.0f;

    Consumer::acquire(shared, stage);
    typename Weights::Made made[2];
    made[0] = Weights::make(a[0], shared.weights(stage.at), 0, 0, lane);
#pragma unroll 1
    for (int k_block = 0; k_block < KBlocks::kCount; ++k_block) {
      const Stage here = stage;
      const uint32_t weights = shared.weights(here.at);
      const WgmmaRows tokens(shared.tokens(here.at));
      stage.advance();
      uint32_t loaded = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int j = i / kGroups, group = i % kGroups, next = i + 1;
        float scales[2];
        if constexpr (Shape::kFolds) {
          if (made[i % 2].apart) add_groups<kN>(part, sums[j], a[i % 2], weights, tokens, j, lane);
          scales[0] = e8m0_scale(made[i % 2].largest & 0xFFFF), scales[1] = e8m0_scale(made[i % 2].largest >> 16);
        }
        wgmma_fence();
#pragma unroll
        for (int f = 0; f < kGroupFragments; ++f) {
          Wgmma<typename Shape::Codes::Product, kN>::run(part, a[i % 2][f],
                                                         tokens.at((group * kGroupFragments + f) * 32), f > 0);
        }
        wgmma_commit();
        issue_products();
        if (next < kCount) {
          made[next % 2] = Weights::make(a[next % 2], weights, next / kGroups, next % kGroups, lane);
        } else if (k_block + 1 < KBlocks::kCount) {
          Consumer::acquire(shared, stage);
          made[0] = Weights::make(a[0], shared.weights(stage.at), 0, 0, lane);
        }
        if constexpr (!Shape::kFolds) Weights::load_scales(scales, weights, j, group, lane);
        wgmma_wait<0>();
        loaded = __float_as_uint(scales[0]) | __float_as_uint(scales[1]);
        if constexpr (WgmmaStorage<Shape>::kRowGroups) {
          loaded |= Weights::close_rows(sums[j], part, scales, weights, lane);
        } else {
          Weights::close(sums[j], part, scales);
        }
      }
      Consumer::release(shared, here.at, lane, loaded);
    }
    if constexpr (Zeros::Stages::kAny) Zeros::template add<kN>(gemm, shared, record, lane, stage, sums);
  }

  // Slab j with scales that are too far apart for one sum of all groups: each has one of its own. What would be added
  // to the slab's sums after it is zero.
  template <int kN>
  __device__ __forceinline__ static void add_groups(typename Shape::T::Sum (&part)[kN / 2], float (&sums)[kN / 2],
                                                    typename Weights::Fragments& a, uint32_t weights,
                                                    const WgmmaRows& tokens, int j, const Lane& lane) {
#pragma unroll 1
    for (int group = 0; group < Shape::kScaleRows; ++group) {
      uint32_t first[Weights::kWords], second[Weights::kWords];
      Weights::load_words(first, second, Weights::words_at(weights, j, lane), group);
      Shape::Codes::fragment(first, second, a[0], Shape::Codes::kMost * 0x00010001);
      wgmma_operand_ready(a[0]);
      float scales[2];
      Weights::load_scales(scales, weights, j, group, lane);
      wgmma_fence();
      Wgmma<typename Shape::Codes::Product, kN>::run(part, a[0], tokens.at(group * 32), false);
      wgmma_commit();
      wgmma_wait<0>();
      Weights::close(sums, part, scales);
    }
#pragma unroll
    for (int f = 0; f < Weights::kGroupFragments; ++f) {
      a[f][0] = a[f][1] = a[f][2] = a[f][3] = 0;
      wgmma_operand_ready(a[f]);
    }
  }
};

// Stores the sums of a tile: of each row what a lane has, side by side.
template <class Gemm>
struct WgmmaByteResults {
  using Shape = typename Gemm::Shape;
  using Tile = typename Shape::Tile;
  using Epilogue = typename Shape::Epilogue;
  static constexpr int kSubTiles = Shape::kWarpSubTiles, kCount = 2 * kSubTiles;

  template <int kN>
  __device__ __forceinline__ static void gather(float (&values)[kCount], const float (&sums)[Tile::kSubTiles][kN / 2],
                                                int half, int s, bool exchanged) {
#pragma unroll
    for (int p = 0; p < kSubTiles; ++p)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const float value = sums[half * kSubTiles + p][s + 2 * b];
        values[2 * p + b] = Gemm::Weights::kResidualScale *
                            (kSubTiles == 2 && exchanged ? sums[half * kSubTiles + 1 - p % 2][s + 2 * b] : value);
      }
  }

  template <int kN>
  __device__ __forceinline__ static void store(const Gemm& gemm, const typename WgmmaStorage<Shape>::Record& record,
                                               const WgmmaLane<Shape>& lane,
                                               const float (&sums)[Tile::kSubTiles][kN / 2]) {
    const typename Shape::ExpertIndex expert = record.expert;
    const WgmmaByteColumns<Shape> columns(lane);
    const int unit = (Shape::first_unit(record.column_tile) + lane.unit(0)) * kUnitColumns;
    const int column = unit + columns.first * 8 + columns.r, place = unit + columns.r * 8 + columns.first;
#pragma unroll
    for (int t = 0; t < kN / 8; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * t + lane.lane % 4 * 2 + i;
        const float2 factors = {record.factors[0][row], record.factors[1][row]};
        float values[kCount], up[kCount] = {};
        gather<kN>(values, sums, 0, 4 * t + i, columns.exchanged);
        if constexpr (Epilogue::kGated) gather<kN>(up, sums, 1, 4 * t + i, columns.exchanged);
        gemm.epilogue.store_places(expert, record.slots[row], factors, column, place, values, up);
      }
  }
};

}  // namespace jmm
