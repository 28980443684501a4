// From packed words to fragments of weights without a scale, for kernels that spend an FMA on each pair: it takes the
// zero point out, and lets a code stay where the word has it.
//
// Pair i of a fragment, of column i % 2 and half i / 2 of K (fragments_raw.cuh has the order), holds
// (kStep * code + bias(i)) * 2^-exponent(i), and
//   kStep * (code - zero) = a[i] * 2^exponent(i) - (bias(i) + kStep * zero)
// is exact in T: codes and zero points have 8 bits at most.
#pragma once

#include "weights/fragments_raw.cuh"

namespace jmm {

// Codes that are floats have no zero point; those that bfloat16's exponent left far too small come to scale.
template <class Code, class T>
struct Unpacker : Dequantizer<Code, T> {
  using Raw = Dequantizer<Code, T>;
  static constexpr bool kHasZero = false, kComesToScale = Raw::token_exponent(0) != 0;
  static constexpr float kStep = kComesToScale ? 1.0f : Raw::kStep;

  __device__ static constexpr int exponent(int) { return kComesToScale ? -Raw::kExponent : 0; }
  __device__ static constexpr float bias(int) { return 0.0f; }
};

// The upper nibble of a byte stays where it is, as 16 q * 2^-133 (see Dequantizer); the lower one becomes 128 + q.
template <>
struct Unpacker<Int4, BFloat> {
  static constexpr bool kHasZero = true;
  static constexpr float kStep = power_of_two(127 - 129);  // 16 * 2^-133, times the largest power of two

  __device__ static constexpr int exponent(int i) { return i < 2 ? -2 : 127; }
  __device__ static constexpr float bias(int i) { return i < 2 ? 128.0f * kStep : 0.0f; }

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
struct Unpacker<Int8, BFloat> : Dequantizer<Int8, BFloat> {  // q * 2^-133
  static constexpr bool kHasZero = true;
  static constexpr float kStep = power_of_two(127 - 133);

  __device__ static constexpr int exponent(int) { return 127; }
  __device__ static constexpr float bias(int) { return 0.0f; }
};

// float16 stores 10 bits of mantissa: 0x6400 | bits is 1024 + bits, be they q or, in the upper nibble, 16 q. (As
// subnormals they would leave a float16 scale no room.)
template <>
struct Unpacker<Int4, Half> {
  static constexpr bool kHasZero = true;
  static constexpr float kStep = 1.0f;

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
struct Unpacker<Int8, Half> {
  static constexpr bool kHasZero = true;
  static constexpr float kStep = 1.0f;

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

// The bits of -value, which T holds exactly, twice.
template <class T>
__device__ constexpr uint32_t paired_negative(float value) {
  if (value == 0.0f) return 0x80008000u;
  int exponent = 0;
  for (; value >= 2.0f; ++exponent) value *= 0.5f;
  for (; value < 1.0f; --exponent) value *= 2.0f;
  const uint32_t mantissa = static_cast<uint32_t>((value - 1.0f) * power_of_two(T::kMantissaBits));
  return (0x8000u | (exponent + T::kExponentBias) << T::kMantissaBits | mantissa) * 0x10001u;
}

}  // namespace jmm
