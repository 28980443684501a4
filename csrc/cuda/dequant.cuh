// From one packed word to the A fragment of an MMA: 16 columns of the weight matrix (rows of A) by 16 of K.
//
// Marlin's order makes the eight codes of a word exactly the eight values that one lane owns: columns g and g + 8
// (g = lane / 4), k in {2t, 2t+1, 2t+8, 2t+9} (t = lane % 4). A fragment holds kStep * code + kOffset, exact in its
// type and two instructions a pair; the group's end takes the offset, the zero point and the scale out of the float32
// sums:
//   sum_k (code - zero) * x = (sum_k a * x - (kOffset + kStep * zero) * sum_k x) / kStep.
#pragma once

#include "ptx.cuh"

namespace jmm {

// Codes of 4 bits with a zero point of 8, or of each group's own.
struct Int4 {
  static constexpr int kBits = 4;
  static constexpr int kBakedZero = 8;
};

template <class Code, class T>
struct Dequantizer;

// bfloat16 stores 7 bits of mantissa: 0x4300 | q is 128 + q. Marlin's pairs are 16 bits apart, so one shift serves two.
template <>
struct Dequantizer<Int4, BFloat> {
  static constexpr float kStep = 1.0f, kOffset = 128.0f;
  static constexpr uint32_t kOnes = 0x3F803F80u;

  __device__ __forceinline__ static void fragment(uint32_t word, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x000F000Fu, kBias = 0x43004300u;
    a[0] = and_or(word, kMask, kBias);
    a[2] = and_or(word >> 4, kMask, kBias);
    a[1] = and_or(word >> 8, kMask, kBias);
    a[3] = and_or(word >> 12, kMask, kBias);
  }
};

// The bits of a code are the subnormal float16 q * 2^-24: nothing to add, nothing to cancel.
template <>
struct Dequantizer<Int4, Half> {
  static constexpr float kStep = 1.0f / 16777216.0f, kOffset = 0.0f;
  static constexpr uint32_t kOnes = 0x3C003C00u;

  __device__ __forceinline__ static void fragment(uint32_t word, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x000F000Fu;
    a[0] = word & kMask;
    a[2] = word >> 4 & kMask;
    a[1] = word >> 8 & kMask;
    a[3] = word >> 12 & kMask;
  }
};

// Zero point of column g + 8 j in one word of FORMATS section 4.
__device__ __forceinline__ uint32_t zero_of_column(uint32_t word, int j) {
  return (word >> (4 * (j / 2 + 4 * (j % 2)))) & 0xFu;
}

}  // namespace jmm
