// Rows of 8 bits on wgmma: what zero points take from the sums, by a product of their own with the sums of rows of x.
#pragma once

#include "gemm/wgmma/bytes_weights.cuh"
#include "gemm/wgmma/zero_stages.cuh"
#include "ptx/hopper.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// The rows of a tile with kN of them, by parts: thirds, where a slab's sums of a k-block have no registers for all, and
// halves, where each instruction has sums of its own, for which it would be waited.
template <int kN, bool kSumsInstructions>
struct WgmmaByteParts {
  static constexpr int kCount = kN > 128 ? 3 : kSumsInstructions && kN >= 64 && kN % 32 == 0 ? 2 : 1;
  static constexpr int kRows = kN / kCount;
  static_assert(kRows % 16 == 0, "instructions have all rows of a part");
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
  template <int kN>
  using Parts = WgmmaByteParts<kN, false>;
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
    constexpr int kMost = Parts<kN>::kCount > 1 ? 1 : Tile::kStages / 2;
    constexpr int kHeld = Stages::kCount < kMost ? Stages::kCount : kMost;
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

  // Starts the product of a fragment with the sums of a part of the rows.
  template <int kN>
  __device__ __forceinline__ static void multiply(float (&part)[Parts<kN>::kRows / 2], const Fragments& a,
                                                  const WgmmaRows& row_sums, int p, int accumulate) {
    using Product = Wgmma<BFloat, Parts<kN>::kRows>;
    constexpr int kLow = 32;  // bytes of a row from high parts to low ones
    const int at = p * Parts<kN>::kRows * 128;
    wgmma_fence();
    Product::run(part, a.high, row_sums.at(at), accumulate);
    Product::run(part, a.high, row_sums.at(at + kLow), true);
    if constexpr (kSplitsScales) Product::run(part, a.low, row_sums.at(at), true);
    wgmma_commit();
    issue_products();
  }

  template <int kN, int kHere>
  __device__ __forceinline__ static void add_stages(const Gemm& gemm, const Shared& shared, const Record& record,
                                                    const Lane& lane, int first, Stage& stage,
                                                    float (&sums)[Tile::kSubTiles][kN / 2]) {
    static_assert(kHere == 1 || Parts<kN>::kCount == 1, "one part's sums of all stages");
    constexpr int kProducts = Tile::kSubTiles * kHere;
    int places[kHere];
#pragma unroll
    for (int s = 0; s < kHere; ++s) {
      Consumer::acquire(shared, stage);
      places[s] = stage.at;
      stage.advance();
    }
    float part[Parts<kN>::kRows / 2];
    Fragments a[2];  // being made, and in use
    make(a[0], gemm, record, shared.weights(places[0]), first, 0, lane);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int j = i / kHere, s = i % kHere, next = i + 1;
      const WgmmaRows row_sums(shared.tokens(places[s]));
      multiply<kN>(part, a[i % 2], row_sums, 0, s > 0);
      if (next < kProducts) {
        wgmma_wait<1>();  // the fragment before is free
        make(a[next % 2], gemm, record, shared.weights(places[next % kHere]), first + next % kHere, next / kHere, lane);
      }
      if (s + 1 == kHere) {
        wgmma_wait<0>();
#pragma unroll
        for (int t = 0; t < Parts<kN>::kRows / 2; ++t) sums[j][t] += part[t];
      }
#pragma unroll
      for (int p = 1; p < Parts<kN>::kCount; ++p) {
        multiply<kN>(part, a[i % 2], row_sums, p, false);
        wgmma_wait<0>();
#pragma unroll
        for (int t = 0; t < Parts<kN>::kRows / 2; ++t) sums[j][p * Parts<kN>::kRows / 2 + t] += part[t];
      }
    }
#pragma unroll
    for (int s = 0; s < kHere; ++s) Consumer::release(shared, places[s], lane, 0);  // all that was loaded is in use
  }
};

}  // namespace jmm
