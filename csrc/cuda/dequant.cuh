// From one packed word to the A fragment of an MMA: 16 columns of the weight matrix (rows of A) by 16 of K.
//
// Marlin's order makes the eight codes of a word exactly the eight values that one lane owns: columns g and g + 8
// (g = lane / 4), k in {2t, 2t+1, 2t+8, 2t+9} (t = lane % 4). The fragments hold code - zero, a small integer that
// both 16-bit types represent exactly; the scale is applied to float32 accumulators, once per group.
#pragma once

#include "ptx.cuh"

namespace jmm {

// Codes of 4 bits with a zero point of 8, or of each group's own.
struct Int4 {
  static constexpr int kBits = 4;
  static constexpr uint32_t kBakedZero = 8;
};

template <class Code, class T>
struct Dequantizer;

#if __CUDA_ARCH__ >= 800
template <>
struct Dequantizer<Int4, BFloat> {
  // bfloat16 has 7 stored mantissa bits: 0x4300 | q is 128 + q, and 0xC300 | z is -(128 + z).
  struct Zero {
    uint32_t minus_offset;
  };
  __device__ __forceinline__ static Zero zero(uint32_t z) { return {0xC300C300u | z * 0x00010001u}; }

  __device__ __forceinline__ static void fragment(uint32_t word, Zero low, Zero high, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x000F000Fu, kBias = 0x43004300u, kOne = 0x3F803F80u;
    a[0] = fma_x2<BFloat>(and_or(word, kMask, kBias), kOne, low.minus_offset);
    a[2] = fma_x2<BFloat>(and_or(word >> 4, kMask, kBias), kOne, low.minus_offset);
    a[1] = fma_x2<BFloat>(and_or(word >> 8, kMask, kBias), kOne, high.minus_offset);
    a[3] = fma_x2<BFloat>(and_or(word >> 12, kMask, kBias), kOne, high.minus_offset);
  }
};
#endif

template <>
struct Dequantizer<Int4, Half> {
  // float16 has 10: 0x6400 | q is 1024 + q, and 0x6400 | 16 q is 1024 + 16 q, which spares the shift of every
  // second nibble: (1024 + 16 q) / 16 - (64 + z).
  struct Zero {
    uint32_t minus_offset, minus_offset_16th;
  };
  __device__ __forceinline__ static Zero zero(uint32_t z) {
    return {0xE400E400u | z * 0x00010001u, 0xD400D400u | z * 0x00100010u};
  }

  __device__ __forceinline__ static void fragment(uint32_t word, Zero low, Zero high, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x000F000Fu, kBias = 0x64006400u, kOne = 0x3C003C00u, kSixteenth = 0x2C002C00u;
    uint32_t shifted = word >> 8;
    a[0] = fma_x2<Half>(and_or(word, kMask, kBias), kOne, low.minus_offset);
    a[2] = fma_x2<Half>(and_or(word, kMask << 4, kBias), kSixteenth, low.minus_offset_16th);
    a[1] = fma_x2<Half>(and_or(shifted, kMask, kBias), kOne, high.minus_offset);
    a[3] = fma_x2<Half>(and_or(shifted, kMask << 4, kBias), kSixteenth, high.minus_offset_16th);
  }
};

// Zero points of the columns g + 8 j, j = 0..7, in one word of FORMATS section 4.
__device__ __forceinline__ uint32_t zero_of_column(uint32_t word, int j) {
  return (word >> (4 * (j / 2 + 4 * (j % 2)))) & 0xFu;
}

}  // namespace jmm
