// From packed words to A fragments of the transposed matrix, with scales and zero points applied.
//
// A product with the transpose sums over the columns of W, along which scales vary: weights are scaled before they are
// multiplied, as pairs of T, rounded once. In the order of the words a fragment has columns of W for its rows
// (fragments_raw.cuh); movmatrix transposes each of its 8 x 8 quarters, and two of them change places.
#pragma once

#include "gemm/problem.cuh"
#include "ptx/matrices.cuh"
#include "ptx/numbers.cuh"
#include "weights/fragments_offset.cuh"

namespace jmm {

// Of the columns of one unit in one group.
template <class Problem>
struct ScaledFragments {
  using T = typename Problem::T;
  using Code = typename Problem::Code;
  using Codes = OffsetFragments<Code, T>;
  using Scales = ColumnScales<typename Problem::Scale, 8>;
  using Zeros = ColumnZeros<typename Problem::Zeros, Code, typename Problem::Scale>;
  static constexpr int kWords = PackedTile<Code>::kSubTileWords;
  static constexpr bool kFloatZeros = !Zeros::kWhole;
  // Codes that are floats lie at the low end of the exponent of float16. What brings them back is shared between them
  // and their scale, so that neither leaves the range.
  static constexpr bool kComesBack = !Codes::kHasZero && kSame<T, Half>;
  static constexpr int kCodeExponent = kComesBack && kSame<Code, E2M1> ? 7 : 0;
  __device__ static constexpr int scale_exponent() {
    if constexpr (kComesBack) return -Codes::Raw::kExponent - kCodeExponent;
    return 0;
  }
  // What sums are multiplied by in the end.
  static constexpr float kResidualScale = kComesBack ? 1.0f : 1.0f / Codes::kFactor;
  // Scales that T does not hold exactly are split into a high and a low part.
  static constexpr bool kSplits = Problem::kGlobalScales || !kHoldsScale<T, typename Problem::Scale>;

  uint32_t scales[8], low_scales[8];  // of columns g + 8 j, in pairs; g = lane / 4
  uint32_t offsets[8][2];             // of stored zero points: what pairs of either half of K have too much, negative
  uint32_t fractions[8];              // of zero points that are no integers, as a weight

  // `shared_scales` and `shared_zeros` are those of the unit.
  __device__ __forceinline__ void load(uint32_t shared_scales, uint32_t shared_zeros, float global_scale, int lane) {
    Scales group_scales;
    group_scales.load(shared_scales + lane / 4 * 8 * Scales::kBytes);
    Zeros group_zeros;
    group_zeros.load(shared_zeros, lane / 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float scale = group_scales.exact(j) * (power_of_two(scale_exponent()) / Scales::kFactor);
      if constexpr (Problem::kGlobalScales) scale *= global_scale;
      scales[j] = paired(scale);
      if constexpr (kSplits) low_scales[j] = paired(scale - to_float<T>(from_float<T>(scale)));
      if constexpr (Zeros::kStored) {
        const float zero = group_zeros[j];
        const float whole = kFloatZeros ? rintf(zero) : zero;
        offsets[j][0] = paired(-Codes::bias(0) - Codes::kFactor * whole);
        offsets[j][1] = paired(-Codes::bias(2) - Codes::kFactor * whole);
        if constexpr (kFloatZeros) fractions[j] = paired((whole - zero) * scale * Codes::kFactor);
      }
    }
  }

  // The fragment of 16 rows of W by the unit's columns 16 w ... 16 w + 15, from the lane's words of that
  // sub-tile; w is known when loops are unrolled.
  __device__ __forceinline__ void transposed(const uint32_t* words, int w, uint32_t (&a)[4]) const {
    uint32_t codes[4];
    Codes::fragment(words, codes);
    a[0] = transpose_matrix(weight<0>(codes[0], w));
    a[1] = transpose_matrix(weight<2>(codes[2], w));
    a[2] = transpose_matrix(weight<1>(codes[1], w));
    a[3] = transpose_matrix(weight<3>(codes[3], w));
  }

 private:
  __device__ __forceinline__ static uint32_t paired(float value) { return from_float<T>(value) * 0x10001u; }

  template <int i>
  __device__ __forceinline__ uint32_t weight(uint32_t code, int w) const {
    const int j = 2 * w + i % 2;
    constexpr int kExponent = kComesBack ? kCodeExponent : Codes::exponent(i);
    if constexpr (Zeros::kStored) {
      code = multiply_add_pairs<T>(code, paired_power<T>(kExponent), offsets[j][i / 2]);
    } else if constexpr (Codes::kHasZero) {
      constexpr uint32_t kOffset = paired_negative<T>(Codes::bias(i) + Codes::kFactor * Zeros::kBaked);
      code = multiply_add_pairs<T>(code, paired_power<T>(kExponent), kOffset);
    } else if constexpr (kExponent != 0) {
      code = multiply_pairs<T>(code, paired_power<T>(kExponent));
    }
    if constexpr (kSplits && kFloatZeros) {
      return multiply_add_pairs<T>(code, scales[j], multiply_add_pairs<T>(code, low_scales[j], fractions[j]));
    } else if constexpr (kSplits) {
      return multiply_add_pairs<T>(code, scales[j], multiply_pairs<T>(code, low_scales[j]));
    } else if constexpr (kFloatZeros) {
      return multiply_add_pairs<T>(code, scales[j], fractions[j]);
    } else {
      return multiply_pairs<T>(code, scales[j]);
    }
  }
};

}  // namespace jmm
