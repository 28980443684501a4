// The product with rows of 8 bits on wgmma: what differs from rows of 16 (docs/kernels.md, "8-bit activations").
//
// Sums of a k-block of 128 rows are made slab by slab, 64 columns of a warpgroup at a time: one slab's sums of the
// k-block and all sums of the tile are what registers have room for. A slab's sums are scaled, in float32, into those
// of the tile while the tensor cores work for the other warpgroup.
#pragma once

#include "gemm/wgmma/bytes_weights.cuh"
#include "gemm/wgmma/bytes_zeros.cuh"
#include "ptx/hopper.cuh"

namespace jmm {

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
  using Sum = typename Shape::T::Sum;
  template <int kN>
  using Parts = WgmmaByteParts<kN, (Shape::kSumGroups > 1)>;
  static constexpr int kGroups = Shape::kSumGroups, kGroupFragments = Weights::kGroupFragments;
  static_assert(Shape::kScaleRows == 1 || !(Zeros::Stages::kAny || WgmmaStorage<Shape>::kRowGroups),
                "zero points and scales of rows are those of k-blocks");

  template <int kN>
  __device__ __forceinline__ static void run(const Gemm& gemm, const Shared& shared, const Record& record,
                                             const Lane& lane, Stage stage, float (&sums)[Tile::kSubTiles][kN / 2]) {
#pragma unroll
    for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) sums[j][i] = 0.0f;
    if constexpr (Parts<kN>::kCount > 1) {
      sum_by_parts<kN>(shared, lane, stage, sums);
    } else {
      sum_at_once<kN>(shared, lane, stage, sums);
    }
    if constexpr (Zeros::Stages::kAny) Zeros::template add<kN>(gemm, shared, record, lane, stage, sums);
  }

 private:
  // Stages to sums; `stage` ends behind them.
  template <int kN>
  __device__ __forceinline__ static void sum_at_once(const Shared& shared, const Lane& lane, Stage& stage,
                                                     float (&sums)[Tile::kSubTiles][kN / 2]) {
    constexpr int kCount = Tile::kSubTiles * kGroups;
    Sum part[kN / 2];                  // of a slab and a group of a k-block
    typename Weights::Fragments a[2];  // weights: being made, and in use
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
        multiply<kN>(part, a[i % 2], tokens, group, 0);
        if (next < kCount) {
          made[next % 2] = Weights::make(a[next % 2], weights, next / kGroups, next % kGroups, lane);
        } else if (k_block + 1 < KBlocks::kCount) {
          Consumer::acquire(shared, stage);
          made[0] = Weights::make(a[0], shared.weights(stage.at), 0, 0, lane);
        }
        if constexpr (!Shape::kFolds) Weights::load_scales(scales, weights, j, group, lane);
        wgmma_wait<0>();
        loaded = __float_as_uint(scales[0]) | __float_as_uint(scales[1]);
        loaded |= close<kN>(sums[j], part, scales, weights, 0, lane);
      }
      Consumer::release(shared, here.at, lane, loaded);
    }
  }

  // The same by parts of the tokens, two of which have registers: one is scaled into the sums of the tile while the
  // other is made, and both are on their way while the next fragments are.
  template <int kN>
  __device__ __forceinline__ static void sum_by_parts(const Shared& shared, const Lane& lane, Stage& stage,
                                                      float (&sums)[Tile::kSubTiles][kN / 2]) {
    constexpr int kCount = Tile::kSubTiles * kGroups, kProducts = kCount * Parts<kN>::kCount;
    Sum part[2][Parts<kN>::kRows / 2];
    typename Weights::Fragments a[2];  // as above
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
      float scales[2][2];
#pragma unroll
      for (int q = 0; q < kProducts; ++q) {
        const int i = q / Parts<kN>::kCount, p = q % Parts<kN>::kCount, j = i / kGroups, group = i % kGroups,
                  next = i + 1;
        if (p == 0) {
          if constexpr (Shape::kFolds) {
            if (made[i % 2].apart) add_groups<kN>(part[q % 2], sums[j], a[i % 2], weights, tokens, j, lane);
            scales[i % 2][0] = e8m0_scale(made[i % 2].largest & 0xFFFF);
            scales[i % 2][1] = e8m0_scale(made[i % 2].largest >> 16);
          } else {
            Weights::load_scales(scales[i % 2], weights, j, group, lane);
          }
          loaded = __float_as_uint(scales[i % 2][0]) | __float_as_uint(scales[i % 2][1]);
        }
        multiply<kN>(part[q % 2], a[i % 2], tokens, group, p);
        if (p == 1) {
          if (next < kCount) {
            made[next % 2] = Weights::make(a[next % 2], weights, next / kGroups, next % kGroups, lane);
          } else if (k_block + 1 < KBlocks::kCount) {
            Consumer::acquire(shared, stage);
            made[0] = Weights::make(a[0], shared.weights(stage.at), 0, 0, lane);
          }
        }
        if (q > 0) {
          wgmma_wait<1>();
          const int before = q - 1, of = before / Parts<kN>::kCount;
          loaded |= close<kN>(sums[of / kGroups], part[before % 2], scales[of % 2], weights, before % Parts<kN>::kCount,
                              lane);
        }
      }
      wgmma_wait<0>();
      loaded |= close<kN>(sums[Tile::kSubTiles - 1], part[(kProducts - 1) % 2], scales[(kCount - 1) % 2], weights,
                          Parts<kN>::kCount - 1, lane);
      Consumer::release(shared, here.at, lane, loaded);
    }
  }

  // Starts the product of a group with a part of the tokens.
  template <int kN>
  __device__ __forceinline__ static void multiply(Sum (&part)[Parts<kN>::kRows / 2],
                                                  const typename Weights::Fragments& a, const WgmmaRows& tokens,
                                                  int group, int p) {
    constexpr int kRows = Parts<kN>::kRows;
    wgmma_fence();
#pragma unroll
    for (int f = 0; f < kGroupFragments; ++f) {
      Wgmma<typename Shape::Codes::Product, kRows>::run(
          part, a[f], tokens.at((group * kGroupFragments + f) * 32 + p * kRows * 128), f > 0);
    }
    wgmma_commit();
    issue_products();
  }
  // Adds its sums to those of the tile. Returns bits of all that it has loaded.
  template <int kN>
  __device__ __forceinline__ static uint32_t close(float (&sums)[kN / 2], const Sum (&part)[Parts<kN>::kRows / 2],
                                                   const float (&scales)[2], uint32_t weights, int p,
                                                   const Lane& lane) {
    constexpr int kRows = Parts<kN>::kRows;
    auto& of_part = reinterpret_cast<float (&)[kRows / 2]>(sums[p * kRows / 2]);
    if constexpr (WgmmaStorage<Shape>::kRowGroups) {
      return Weights::close_rows(of_part, part, scales, weights + p * kRows * 4, lane);
    } else {
      Weights::close(of_part, part, scales);
      return 0;
    }
  }

  // Slab j with scales that are too far apart for one sum of all groups: each has one of its own. What would be added
  // to the slab's sums after it is zero.
  template <int kN>
  __device__ __forceinline__ static void add_groups(Sum (&part)[Parts<kN>::kRows / 2], float (&sums)[kN / 2],
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
#pragma unroll
      for (int p = 0; p < Parts<kN>::kCount; ++p) {
        constexpr int kRows = Parts<kN>::kRows;
        wgmma_fence();
        Wgmma<typename Shape::Codes::Product, kRows>::run(part, a[0], tokens.at(group * 32 + p * kRows * 128), false);
        wgmma_commit();
        wgmma_wait<0>();
        close<kN>(sums, part, scales, weights, p, lane);
      }
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
