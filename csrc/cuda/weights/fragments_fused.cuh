// From packed words to A fragments of weights by one FMA for each pair, where all 4-bit codes have the same zero point,
// a power of two: code * scale - zero * scale is rounded once, for zero * scale is exact.
//
// Codes are bfloat16's subnormals, as RawFragments has them. What they lack is in the factors, and to keep these finite
// weights are 2^-kExponent of what they stand for: scales may have 2^-94 to 2^25.
#pragma once

#include "ptx/numbers.cuh"
#include "weights/fragments_raw.cuh"
#include "weights/zeros.cuh"

namespace jmm {

template <class Code, class T, class Zeros>
constexpr bool kFusesZero = false;
template <int kZero>
constexpr bool kFusesZero<Int4, BFloat, BakedZero<kZero>> = (kZero & (kZero - 1)) == 0;

// Of a column: what pairs of a fragment are multiplied by, in either half of K, and what is added.
struct FusedScale {
  using Codes = RawFragments<Int4, BFloat>;
  static constexpr int kExponent = 32;

  uint32_t factors[2], added;

  // `scale` is a pair of it.
  __device__ __forceinline__ static FusedScale of(uint32_t scale, float zero) {
    return {{multiply_pairs<BFloat>(scale, paired_power<BFloat>(exponent(0))),
             multiply_pairs<BFloat>(scale, paired_power<BFloat>(exponent(1)))},
            multiply_pairs<BFloat>(scale, paired_negative<BFloat>(zero * power_of_two(-kExponent)))};
  }

  // Of pair i of a fragment, of half i / 2 of K.
  template <int i>
  __device__ __forceinline__ uint32_t weight(uint32_t code) const {
    return multiply_add_pairs<BFloat>(code, factors[i / 2], added);
  }

 private:
  __device__ static constexpr int exponent(int half) {
    return Codes::token_exponent(half) - kTokenExponent<BFloat> - kLeastExponent<BFloat> - kExponent;
  }
};

}  // namespace jmm
