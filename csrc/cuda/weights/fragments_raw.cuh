// From packed words to A fragments of codes: converted exactly, with neither scale nor zero point applied.
//
// Marlin's order makes the eight codes of a sub-tile (16 columns of the weight matrix, the rows of A, by 16 of K) that
// a lane holds exactly the eight values that it owns in the fragment: columns g and g + 8 (g = lane / 4), k in
// {2t, 2t+1, 2t+8, 2t+9} (t = lane % 4), in pairs 16 bits apart. A fragment holds kFactor * value, exact in its type;
// the group's end takes the zero point and the scale out of the float32 sums:
//   sum_k (value - zero) * x = (sum_k a * x - kFactor * zero * sum_k x) / kFactor.
// Where bfloat16's exponent is too wide for a cheap conversion, the fragment is far too small by a power of two, and
// the tokens are multiplied by 2^token_exponent(half of K) on their way into the MMA, which shares the way back.
#pragma once

#include "ptx/numbers.cuh"
#include "weights/codes.cuh"

namespace jmm {

// Rows of bfloat16 are safe up to 2^47, and sums down to 2^-126 keep every bit of products of 2^-73.
template <class T>
constexpr int kTokenExponent = 0;
template <>
constexpr int kTokenExponent<BFloat> = 80;

// Fragments that hold the value times 2^kExponent, with the same tokens for both halves of K.
template <class T, int kExponent_>
struct EvenFragments {
  static constexpr int kExponent = kExponent_;
  static constexpr float kFactor = power_of_two(kExponent + kTokenExponent<T>);

  __device__ static constexpr int token_exponent(int) { return kTokenExponent<T>; }
};

// Of the least subnormal of T, which the lowest bit stands for.
template <class T>
constexpr int kLeastExponent = 1 - T::kExponentBias - T::kMantissaBits;

// From the words of a sub-tile that a lane holds: one of 4-bit codes, two of 8-bit codes, four of 16-bit ones.
//
// Floats of 8 bits at the low end of the exponent of T: the value times 2^(their bias - bias of T), subnormal codes as
// subnormals. Other codes have a specialisation each.
template <class Code, class T>
struct RawFragments : EvenFragments<T, (1 << (Code::kExponentBits - 1)) - 1 - T::kExponentBias> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
    constexpr int kLeft = T::kMantissaBits - (7 - Code::kExponentBits);  // from the low byte of a half to its place
    constexpr uint32_t kMagnitude = 0x00010001u * (0x7Fu << kLeft);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t word = words[b];
      a[b] = and_or(word << 8, 0x80008000u, word << kLeft & kMagnitude);
      a[2 + b] = and_or(word, 0x80008000u, word >> (8 - kLeft) & kMagnitude);
    }
  }
};

// Integers up to 255 at the low end of bfloat16 are its subnormals and the first of its normal numbers, on one line:
// q * 2^-133. The upper nibble of a byte stays where it is, as 16 q: its half of K has tokens 16 times less.
template <>
struct RawFragments<Int4, BFloat> {
  static constexpr float kFactor = power_of_two(kTokenExponent<BFloat> - 133);

  __device__ static constexpr int token_exponent(int half) { return kTokenExponent<BFloat> - 4 * half; }
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t bytes = words[0] >> 8 * b;
      a[b] = bytes & 0x000F000Fu;
      a[2 + b] = bytes & 0x00F000F0u;
    }
  }
};

// The same in float16, q * 2^-24, but that its exponent has no room for tokens 16 times less.
template <>
struct RawFragments<Int4, Half> : EvenFragments<Half, kLeastExponent<Half>> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
    constexpr uint32_t kSixteenth = paired_power<Half>(-4);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t bytes = words[0] >> 8 * b;
      a[b] = bytes & 0x000F000Fu;
      a[2 + b] = multiply_pairs<Half>(bytes & 0x00F000F0u, kSixteenth);
    }
  }
};

template <class T>
struct RawFragments<Int8, T> : EvenFragments<T, kLeastExponent<T>> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      a[b] = words[b] & 0x00FF00FFu;
      a[2 + b] = words[b] >> 8 & 0x00FF00FFu;
    }
  }
};

// A code of sign, 2 bits of exponent (bias 1) and 1 of mantissa, at the low end of the exponent of T: the value times
// 2^(1 - bias of T), subnormal codes as subnormals. Left shifts go to the multipliers' pipe, right shifts to the one
// that the masks keep busy: there is one right shift a word.
template <>
struct RawFragments<E2M1, Half> : EvenFragments<Half, 1 - Half::kExponentBias> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
    const uint32_t word = words[0], top = word >> 3;  // the topmost magnitude in its place
    a[0] = pair(word << 12, word << 9);
    a[2] = pair(word << 8, word << 5);
    a[1] = pair(word << 4, top << 4);
    a[3] = pair(word, top);
  }

 private:
  __device__ __forceinline__ static uint32_t pair(uint32_t signs, uint32_t magnitudes) {
    return and_or(signs, 0x80008000u, magnitudes & 0x0E000E00u);
  }
};

// In bfloat16 the magnitudes of a pair come to their places, bits 6 to 8 of a half, by a shift of the whole word, and
// its signs to bit 15 by a shift of every other sign of the word. Where a sign of another pair lies among them, it lies
// on bit 7: the selection drops it, and with it whatever else of the word is not the pair's.
template <>
struct RawFragments<E2M1, BFloat> : EvenFragments<BFloat, 1 - BFloat::kExponentBias> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
    const uint32_t word = words[0];
    const uint32_t low = opaque(word & 0x08080808u), high = opaque(word & 0x80808080u);  // signs of a byte's codes
    a[0] = pair(word << 6, low << 12);
    a[1] = pair(word >> 2, low << 4);
    a[2] = pair(word << 2, high << 8);
    a[3] = pair(word >> 6, high);
  }

 private:
  __device__ __forceinline__ static uint32_t pair(uint32_t magnitudes, uint32_t signs) {
    return select_bits(0x01C001C0u, magnitudes, signs);
  }
};

// Weights of 16 bits are the pairs of the fragment, of their own type or rounded to that of the tokens.
template <class Stored, class T>
struct WholeFragments {
  static constexpr int kExponent = 0;
  static constexpr float kFactor = 1.0f;

  __device__ static constexpr int token_exponent(int) { return 0; }
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      a[b] = pair(words[2 * b]);
      a[2 + b] = pair(words[2 * b + 1]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t pair(uint32_t word) {
    if constexpr (kSame<Stored, T>) return word;
    const float low = to_float<Stored>(static_cast<uint16_t>(word)), high = to_float<Stored>(word >> 16);
    return from_float<T>(low) | uint32_t(from_float<T>(high)) << 16;
  }
};
template <class T>
struct RawFragments<BF16, T> : WholeFragments<BFloat, T> {};
template <class T>
struct RawFragments<FP16, T> : WholeFragments<Half, T> {};

}  // namespace jmm
