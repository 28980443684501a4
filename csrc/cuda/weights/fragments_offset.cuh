// From packed words to A fragments of codes, for kernels that spend an FMA on each pair: it takes an offset and the
// zero point out, and lets a code stay where the word has it.
//
// Pair i of a fragment, of column i % 2 and half i / 2 of K (fragments_raw.cuh has the order), holds
// (kFactor * code + bias(i)) * 2^-exponent(i), and
//   kFactor * (code - zero) = a[i] * 2^exponent(i) - (bias(i) + kFactor * zero)
// is exact in T: codes and zero points have 8 bits at most.
#pragma once

#include "ptx/numbers.cuh"
#include "weights/fragments_raw.cuh"

namespace jmm {

// Codes that are floats have no zero point; those that bfloat16's exponent left far too small come to scale.
template <class Code, class T>
struct OffsetFragments : RawFragments<Code, T> {
  using Raw = RawFragments<Code, T>;
  static constexpr bool kHasZero = false, kComesToScale = Raw::token_exponent(0) != 0;
  static constexpr float kFactor = kComesToScale ? 1.0f : Raw::kFactor;

  __device__ static constexpr int exponent(int) { return kComesToScale ? -Raw::kExponent : 0; }
  __device__ static constexpr float bias(int) { return 0.0f; }
};

// The upper nibble of a byte stays where it is, as 16 q * 2^-133 (see RawFragments); the lower one becomes 128 + q.
template <>
struct OffsetFragments<Int4, BFloat> {
  static constexpr bool kHasZero = true;
  static constexpr float kFactor = power_of_two(127 - 129);  // 16 * 2^-133, times the largest power of two

  __device__ static constexpr int exponent(int i) { return i < 2 ? -2 : 127; }
  __device__ static constexpr float bias(int i) { return i < 2 ? 128.0f * kFactor : 0.0f; }

  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t bytes = words[0] >> 8 * b;
      a[b] = and_or(bytes, 0x000F000Fu, 0x43004300u);
      a[2 + b] = bytes & 0x00F000F0u;
    }
  }
};

template <>
struct OffsetFragments<Int8, BFloat> : RawFragments<Int8, BFloat> {  // q * 2^-133
  static constexpr bool kHasZero = true;
  static constexpr float kFactor = power_of_two(127 - 133);

  __device__ static constexpr int exponent(int) { return 127; }
  __device__ static constexpr float bias(int) { return 0.0f; }
};

// float16 stores 10 bits of mantissa: 0x6400 | bits is 1024 + bits, be they q or, in the upper nibble, 16 q. (As
// subnormals they would leave a float16 scale no room.)
template <>
struct OffsetFragments<Int4, Half> {
  static constexpr bool kHasZero = true;
  static constexpr float kFactor = 1.0f;

  __device__ static constexpr int exponent(int i) { return i < 2 ? 0 : -4; }
  __device__ static constexpr float bias(int i) { return i < 2 ? 1024.0f : 1024.0f / 16.0f; }

  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t bytes = words[0] >> 8 * b;
      a[b] = and_or(bytes, 0x000F000Fu, 0x64006400u);
      a[2 + b] = and_or(bytes, 0x00F000F0u, 0x64006400u);
    }
  }
};

template <>
struct OffsetFragments<Int8, Half> {
  static constexpr bool kHasZero = true;
  static constexpr float kFactor = 1.0f;

  __device__ static constexpr int exponent(int) { return 0; }
  __device__ static constexpr float bias(int) { return 1024.0f; }

  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      a[b] = and_or(words[b], 0x00FF00FFu, 0x64006400u);
      a[2 + b] = and_or(words[b] >> 8, 0x00FF00FFu, 0x64006400u);
    }
  }
};

}  // namespace jmm
