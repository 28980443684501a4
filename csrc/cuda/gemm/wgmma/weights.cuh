// Shared memory to A fragments: words, scales and zero points of the wgmma kernel.
//
// Weights are multiplied by their scales in 16 bits (no second set of sums; one rounding of each weight, none where
// code and scale have few bits between them), or the float32 sums of a group are when it closes, exactly; the tile says
// which (docs/kernels.md, "Scales and zero points").
#pragma once

#include "gemm/wgmma/storage.cuh"
#include "ptx/hopper.cuh"
#include "ptx/memory.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// A consumer thread's place.
template <class Shape>
struct WgmmaLane {
  int share, warpgroup, warp, lane;  // of K; along the columns; in the warpgroup; in the warp
  uint32_t zero;                     // opaque_zero()

  // The first of this warp's Shape::kWarpSubTiles sub-tiles in a half: its unit in the tile, and its word there.
  __device__ __forceinline__ int unit(int half) const {
    return half * Shape::kHalfUnits + warpgroup * Shape::kWarpSubTiles + warp * Shape::kWarpSubTiles / 4;
  }
  // Four neighbouring lanes' words of one sub-tile lie in banks of their own, those of the lanes behind them in the
  // same banks again, as every fourth word is of the sub-tile. So pairs of columns take turns: each reads another
  // sub-tile.
  __device__ __forceinline__ int word() const { return word_of(lane / 8); }
  // Of the columns 2 t and 2 t + 1, t = lane % 4, as `word` is of those around lane / 4.
  __device__ __forceinline__ int word_of_pair() const { return word_of(lane % 4); }

 private:
  __device__ __forceinline__ int word_of(int pair) const {
    const int first = warp * Shape::kWarpSubTiles % 4;
    if constexpr (!Shape::kTakesTurns) return first;
    return (first + pair) % 4;
  }
};

template <class Shape>
struct WgmmaWeights {
  using T = typename Shape::T;
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Packed = typename Shape::Packed;
  using Codes = typename Shape::Codes;
  using Scales = typename Shape::Scales;
  using Zeros = typename Shape::Zeros;
  using Storage = WgmmaStorage<Shape>;
  using Lane = WgmmaLane<Shape>;

  // Whether scales bring back what floats lack of bfloat16's exponent, but for some of it that would leave no room for
  // the scales themselves, of up to 2^9: one product of a pair in place of two.
  __device__ static constexpr bool brings_back() {
    if constexpr (Tile::kScalesWeights && !Codes::kHasZero) {
      return Codes::kComesToScale && kSame<typename Problem::Scale, E4M3Scale>;
    }
    return false;
  }
  static constexpr bool kBringsBack = brings_back();
  static constexpr int kExponentLeft = 32;

  // What the sums are multiplied by beside the global scales, once they have their scales.
  __device__ static constexpr float residual_scale() {
    if constexpr (Shape::kFuses) return power_of_two(FusedScale::kExponent);
    if constexpr (kBringsBack) return power_of_two(kExponentLeft) / Codes::kFactor;
    return 1.0f / (Tile::kScalesWeights ? Codes::kFactor : Codes::kFactor * Scales::kFactor);
  }
  static constexpr float kResidualScale = residual_scale();
  // Scales that T does not hold exactly are split into a high and a low part, so that they are not rounded before the
  // weight is.
  static constexpr bool kSplitsScales = Tile::kScalesWeights && !kHoldsScale<T, typename Problem::Scale>;

  // A batch is the steps whose products are issued together: as many as there are registers for two sets of fragments
  // (four per sub-tile and step).
  static constexpr int kSumRegisters = Tile::kSubTiles * Tile::kTokens / 2 * (Shape::kTwoSums ? 2 : 1);
  static constexpr int kScalingRegisters =  // beyond the usual
      2 * Tile::kSubTiles * (kSplitsScales + Shape::kFloatZeros + (Zeros::kStored && Codes::bias(0) != Codes::bias(2)));
  static constexpr int kBatchInRegisters =
      (Tile::kConsumerRegisters - Tile::kOtherRegisters - kSumRegisters - kScalingRegisters) /
      (2 * Tile::kSubTiles * 4);
  static constexpr int kLongestBatch =
      KBlocks::kSteps / 2 < KBlocks::kStepsPerScale ? KBlocks::kSteps / 2 : KBlocks::kStepsPerScale;
  static constexpr int kBatch = kBatchInRegisters >= 4 && kLongestBatch >= 4   ? 4
                                : kBatchInRegisters >= 2 && kLongestBatch >= 2 ? 2
                                                                               : 1;
  static constexpr int kBatches = KBlocks::kSteps / kBatch;
  using Words = uint32_t[kBatch][Shape::kHalves][Shape::kWarpSubTiles * Packed::kSubTileWords];
  using Fragments = uint32_t[kBatch][Tile::kSubTiles][4];

  __device__ __forceinline__ static uint32_t paired(float value) { return paired_from_float<T>(value); }

  // The scales of this lane's columns (g and g + 8 of each sub-tile, g = lane / 4) in a half.
  __device__ __forceinline__ static Scales load_scales(uint32_t weights, int row, int half, const Lane& lane) {
    const int unit = row * Shape::kTileUnits + lane.unit(half);
    Scales scales;
    scales.load(weights + Storage::kScalesAt +
                (unit * kUnitColumns + lane.lane / 4 * 8 + lane.word() * 2) * Scales::kBytes);
    return scales;
  }

  // From fragments of codes to weights (but for the scale, where the sums get it), in pairs of T.
  struct Scaling {
    // What pairs of either half of K have too much, negative: for the zero point, rounded to an integer.
    uint32_t offsets[Tile::kSubTiles][4];
    uint32_t scales[Tile::kSubTiles][2];
    uint32_t low_scales[Tile::kSubTiles][2];  // their low parts
    uint32_t zeros[Tile::kSubTiles][2];       // the zero point's fraction, as a weight
    FusedScale fused[Tile::kSubTiles][2];     // in place of all these

    __device__ __forceinline__ void begin(const Operands<Problem>&, int) {}

    __device__ __forceinline__ void load(uint32_t weights, int row, const Lane& lane) {
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h) {
        Zeros group_zeros;
        group_zeros.load(weights + Storage::kZerosAt + (row * Shape::kTileUnits + lane.unit(h)) * Zeros::kUnitBytes,
                         lane.lane / 4);
        Scales group_scales;
        if constexpr (Tile::kScalesWeights) group_scales = load_scales(weights, row, h, lane);
#pragma unroll
        for (int p = 0; p < Shape::kWarpSubTiles; ++p) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int j = h * Shape::kWarpSubTiles + p;
            const float zero = group_zeros[2 * (lane.word() + p) + b];
            const float whole = Shape::kFloatZeros ? rintf(zero) : zero;
            if constexpr (Zeros::kStored) {
              offsets[j][b] = paired(-Codes::bias(0) - Codes::kFactor * whole);
              offsets[j][2 + b] = paired(-Codes::bias(2) - Codes::kFactor * whole);
            }
            if constexpr (Tile::kScalesWeights) {
              const float scale = group_scales.exact(2 * p + b) * (1.0f / Scales::kFactor);
              if constexpr (kBringsBack) {
                scales[j][b] = paired(scale * power_of_two(Codes::exponent(0) - kExponentLeft));
              } else if constexpr (kSame<T, BFloat> && kSame<typename Problem::Scale, E8M0Scale>) {
                scales[j][b] = group_scales.exact_pair(2 * p + b);
              } else {
                scales[j][b] = paired(scale);
              }
              if constexpr (Shape::kFuses) fused[j][b] = FusedScale::of(scales[j][b], Zeros::kBaked);
              if constexpr (kSplitsScales) low_scales[j][b] = paired(scale - to_float<T>(from_float<T>(scale)));
              if constexpr (Shape::kFloatZeros) zeros[j][b] = paired((whole - zero) * scale * Codes::kFactor);
            }
          }
        }
      }
    }

    template <int i>
    __device__ __forceinline__ uint32_t weight(uint32_t code, int j) const {
      if constexpr (Shape::kFuses) return fused[j][i % 2].template weight<i>(code);
      constexpr int kExponent = kBringsBack ? 0 : Codes::exponent(i);
      if constexpr (Zeros::kStored) {
        code = multiply_add_pairs<T>(code, paired_power<T>(kExponent), offsets[j][i]);
      } else if constexpr (Codes::kHasZero) {
        constexpr uint32_t kOffset = paired_negative<T>(Codes::bias(i) + Codes::kFactor * Zeros::kBaked);
        code = multiply_add_pairs<T>(code, paired_power<T>(kExponent), kOffset);
      } else if constexpr (kExponent != 0) {
        code = multiply_pairs<T>(code, paired_power<T>(kExponent));
      }
      if constexpr (!Tile::kScalesWeights) return code;
      const uint32_t scale = scales[j][i % 2];
      if constexpr (kSplitsScales && Shape::kFloatZeros) {
        return multiply_add_pairs<T>(code, scale, multiply_add_pairs<T>(code, low_scales[j][i % 2], zeros[j][i % 2]));
      } else if constexpr (kSplitsScales) {
        return multiply_add_pairs<T>(code, scale, multiply_pairs<T>(code, low_scales[j][i % 2]));
      } else if constexpr (Shape::kFloatZeros) {
        return multiply_add_pairs<T>(code, scale, zeros[j][i % 2]);
      } else {
        return multiply_pairs<T>(code, scale);
      }
    }

    __device__ __forceinline__ void apply(uint32_t (&a)[4], int j) const {
      a[0] = weight<0>(a[0], j), a[1] = weight<1>(a[1], j), a[2] = weight<2>(a[2], j), a[3] = weight<3>(a[3], j);
    }
  };

  // The scales of a group's sums.
  struct Factors {
    float scales[Tile::kSubTiles][2];

    __device__ __forceinline__ Factors(uint32_t weights, int row, const Lane& lane) {
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h) {
        const auto group_scales = load_scales(weights, row, h, lane);
#pragma unroll
        for (int j = 0; j < 2 * Shape::kWarpSubTiles; ++j) {
          scales[h * Shape::kWarpSubTiles + j / 2][j % 2] = group_scales.exact(j);
        }
      }
    }

    __device__ __forceinline__ uint32_t bits() const {
      uint32_t all = 0;
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) all |= __float_as_uint(scales[j][0]) | __float_as_uint(scales[j][1]);
      return all;
    }

    template <int kSums, int kGroupSums>
    __device__ __forceinline__ void close(float (&sums)[Tile::kSubTiles][kSums],
                                          const float (&group_sums)[kGroupSums][kSums]) const {
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const float scale = scales[j][i / 2 % 2];
          sums[j][i] =
              Shape::kTwoSums ? sums[j][i] + group_sums[Shape::kTwoSums ? j : 0][i] * scale : sums[j][i] * scale;
        }
    }
  };

  // A batch's words, and the scales and zero points of the group that begins with it.
  __device__ __forceinline__ static void load(Words& words, Scaling& scaling, uint32_t weights, int batch,
                                              const Lane& lane) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h) {
        load_shared_words(words[s][h], weights + (batch * kBatch + s) * Storage::kStepBytes +
                                           lane.unit(h) * Packed::kBytes + lane.lane * Packed::kLaneBytes +
                                           lane.word() * Packed::kSubTileWords * 4);
      }
    }
    const int step = batch * kBatch;
    if (step % KBlocks::kStepsPerScale == 0) scaling.load(weights, step / KBlocks::kStepsPerScale, lane);
  }

  __device__ __forceinline__ static void make(Fragments& a, const Words& words, const Scaling& scaling, int) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) {
        using Made = typename Select<Shape::kFuses, FusedScale::Codes, Codes>::Type;
        Made::fragment(words[s][j / Shape::kWarpSubTiles] + j % Shape::kWarpSubTiles * Packed::kSubTileWords, a[s][j]);
        scaling.apply(a[s][j], j);
      }
    }
#pragma unroll
    for (int s = 0; s < kBatch; ++s)
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) wgmma_operand_ready(a[s][j]);
  }
};

}  // namespace jmm
