// Four float32 numbers in 64 bits, for rows that are written only to be added up: 14 bits of each, in units of one
// power of two, which follows from the largest of them. The error is at most half a unit: 2^-13 of the largest number.
//
//   lo   a: 14 bits, b: 14 bits, exponent: its low 4 bits
//   hi   c: 14 bits, d: 14 bits, exponent: its high 4 bits
//
// Numbers are signed: b and d, shifted to their places, borrow from the bits of the exponent. A number that is not
// finite makes all four NaN.
#pragma once

#include "ptx/numbers.cuh"

namespace jmm {

// Which columns they are: eight apart, among 32, or two pairs, eight apart, among 16.
template <bool kPairs>
struct PlacesOfFour {
  static constexpr int kGroup = kPairs ? 16 : 32;
  // Of the packed vector of a row that begins with a column, and back.
  __device__ __forceinline__ static int vector_of(int column) {
    return column / kGroup * (kGroup / 4) + column % kGroup / (kPairs ? 2 : 1);
  }
  __device__ __forceinline__ static int column_of(int vector) {
    return vector / (kGroup / 4) * kGroup + vector % (kGroup / 4) * (kPairs ? 2 : 1);
  }
  // From the first column to another of the four.
  __device__ __forceinline__ static constexpr int offset(int c) { return kPairs ? c / 2 * 8 + c % 2 : 8 * c; }
};

struct FourColumns {
  static constexpr int kBits = 14;
  static constexpr uint32_t kMask = (1u << kBits) - 1;
  static constexpr int kLeast = 13, kNotFinite = 255;  // exponents, as those of float32 are biased
  // One and a half times 2^23: the lowest bits of a sum with it are a two's complement integer.
  static constexpr float kMagic = 12582912.0f;

  __device__ __forceinline__ static uint2 pack(float a, float b, float c, float d) {
    const float largest = maximum_or_nan(maximum_or_nan(fabsf(a), fabsf(b)), maximum_or_nan(fabsf(c), fabsf(d)));
    // Of the power of two above, rounded as the numbers will be: no number rounds to 2^13 units.
    const uint32_t rounded = (__float_as_uint(largest) + (1u << (24 - kBits))) >> 23;
    const uint32_t exponent = min(max(rounded, uint32_t(kLeast)), uint32_t(kNotFinite));
    const float units = __uint_as_float((266 - exponent) << 23);  // of one
    return uint2{pair(a, b, units) + (exponent << 28), pair(c, d, units) + (exponent >> 4 << 28)};
  }

  // Adds the four numbers.
  __device__ __forceinline__ static void add(float4& sum, uint2 packed) {
    constexpr uint32_t kSign = 1u << (2 * kBits - 1);  // of the second number of a pair, which has borrowed
    const uint32_t exponent = (packed.x + kSign) >> 28 | (packed.y + kSign) >> 28 << 4;
    const float unit = __uint_as_float(exponent == kNotFinite ? 0x7FC00000 : (exponent - 12) << 23);
    sum.x = fmaf(units(packed.x), unit, sum.x), sum.y = fmaf(units(packed.x >> kBits), unit, sum.y);
    sum.z = fmaf(units(packed.y), unit, sum.z), sum.w = fmaf(units(packed.y >> kBits), unit, sum.w);
  }

 private:
  __device__ __forceinline__ static uint32_t pair(float first, float second, float units) {
    const uint32_t low = __float_as_uint(fmaf(first, units, kMagic)),
                   high = __float_as_uint(fmaf(second, units, kMagic));
    return (low & kMask) | ((high << kBits) & ~kMask);
  }
  // A number of 14 bits, as a float of 2^23 and more, less that.
  __device__ __forceinline__ static float units(uint32_t bits) {
    constexpr uint32_t kHalf = 1u << (kBits - 1);
    return __uint_as_float((bits & kMask) ^ (0x4B000000 | kHalf)) - (8388608.0f + kHalf);
  }
};

}  // namespace jmm
