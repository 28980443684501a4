// From packed words to the A fragment of an MMA, and from stored scales and zero points to float32.
//
// Marlin's order makes the eight codes of a sub-tile (16 columns of the weight matrix, the rows of A, by 16 of K) that
// a lane holds exactly the eight values that it owns in the fragment: columns g and g + 8 (g = lane / 4), k in
// {2t, 2t+1, 2t+8, 2t+9} (t = lane % 4), in pairs 16 bits apart. A fragment holds kStep * value, exact in its type; the
// group's end takes the zero point and the scale out of the float32 sums:
//   sum_k (value - zero) * x = (sum_k a * x - kStep * zero * sum_k x) / kStep.
// Where bfloat16's exponent is too wide for a cheap conversion, the fragment is far too small by a power of two, and
// the tokens are multiplied by 2^token_exponent(half of K) on their way into the MMA, which shares the way back.
#pragma once

#include "ptx/ptx.cuh"

namespace jmm {

struct Int4 {
  static constexpr int kBits = 4;
};
struct Int8 {
  static constexpr int kBits = 8;
};
struct E2M1 {
  static constexpr int kBits = 4;
};
struct E4M3 {
  static constexpr int kBits = 8;
};

template <class Code, class T>
struct Dequantizer;

__device__ constexpr float power_of_two(int exponent) {
  float power = 1.0f;
  for (int i = 0; i < exponent; ++i) power *= 2.0f;
  for (int i = 0; i > exponent; --i) power *= 0.5f;
  return power;
}

// The bits of 2^exponent, twice.
template <class T>
__device__ constexpr uint32_t paired_power(int exponent) {
  return ((exponent + T::kExponentBias) << T::kMantissaBits) * 0x10001u;
}

// Rows of bfloat16 are safe up to 2^47, and sums down to 2^-126 keep every bit of products of 2^-73.
template <class T>
constexpr int kFarTokenExponent = 0;
template <>
constexpr int kFarTokenExponent<BFloat> = 80;

// Fragments that hold the value times 2^kExponent, with the same tokens for both halves of K.
template <class T, int kExponent_>
struct EvenFragments {
  static constexpr int kExponent = kExponent_;
  static constexpr float kStep = power_of_two(kExponent + kFarTokenExponent<T>);

  __device__ static constexpr int token_exponent(int) { return kFarTokenExponent<T>; }
};

// Of the least subnormal of T, which the lowest bit stands for.
template <class T>
constexpr int kLeastExponent = 1 - T::kExponentBias - T::kMantissaBits;

// Integers up to 255 at the low end of bfloat16 are its subnormals and the first of its normal numbers, on one line:
// q * 2^-133. The upper nibble of a byte stays where it is, as 16 q: its half of K has tokens 16 times less.
template <>
struct Dequantizer<Int4, BFloat> {
  static constexpr float kStep = power_of_two(kFarTokenExponent<BFloat> - 133);

  __device__ static constexpr int token_exponent(int half) { return kFarTokenExponent<BFloat> - 4 * half; }
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
struct Dequantizer<Int4, Half> : EvenFragments<Half, kLeastExponent<Half>> {
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
struct Dequantizer<Int8, T> : EvenFragments<T, kLeastExponent<T>> {
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
struct Dequantizer<E2M1, Half> : EvenFragments<Half, 1 - Half::kExponentBias> {
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

// In bfloat16 one multiplication brings sign and magnitude to their places at once: copies of the four bits 6 apart do
// not touch, and a mask takes what is left over.
template <>
struct Dequantizer<E2M1, BFloat> : EvenFragments<BFloat, 1 - BFloat::kExponentBias> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
    constexpr uint32_t kPlaces = 0x81C081C0u, kLower = 1u << 12 | 1u << 6, kUpper = kLower >> 4;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t bytes = words[0] >> 8 * b;
      a[b] = (bytes & 0x000F000Fu) * kLower & kPlaces;
      a[2 + b] = (bytes & 0x00F000F0u) * kUpper & kPlaces;
    }
  }
};

// The same for 4 bits of exponent (bias 7) and 3 of mantissa: the value times 2^(7 - bias of T).
template <class T>
struct Dequantizer<E4M3, T> : EvenFragments<T, 7 - T::kExponentBias> {
  __device__ __forceinline__ static void fragment(const uint32_t* words, uint32_t (&a)[4]) {
    constexpr int kLeft = T::kMantissaBits - 3;  // from the low byte of a half to its place in T
    constexpr uint32_t kMagnitude = 0x00010001u * (0x7Fu << kLeft);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t word = words[b];
      a[b] = and_or(word << 8, 0x80008000u, word << kLeft & kMagnitude);
      a[2 + b] = and_or(word, 0x80008000u, word >> (8 - kLeft) & kMagnitude);
    }
  }
};

// Types of scales: Half, BFloat, Float, and bit patterns of one byte.
struct Float {};
struct E4M3Scale {};
struct E8M0Scale {};

// The scales of one lane's columns g + 8 j, j = 0..7: neighbours in Marlin's order. Each is kUnit too small, which is
// made up for once a tile.
template <class Scale>
struct ColumnScales {  // of 16-bit types
  static constexpr int kBytes = 2;
  static constexpr float kUnit = 1.0f;
  uint4 pairs;

  __device__ __forceinline__ void load(uint32_t shared) { pairs = load_shared16(shared); }
  __device__ __forceinline__ float operator[](int j) const {
    const uint32_t pair = j < 2 ? pairs.x : j < 4 ? pairs.y : j < 6 ? pairs.z : pairs.w;
    return to_float<Scale>(static_cast<uint16_t>(pair >> (16 * (j % 2))));
  }
};

template <>
struct ColumnScales<Float> {
  static constexpr int kBytes = 4;
  static constexpr float kUnit = 1.0f;
  uint4 low, high;

  __device__ __forceinline__ void load(uint32_t shared) {
    low = load_shared16(shared);
    high = load_shared16(shared + 16);
  }
  __device__ __forceinline__ float operator[](int j) const {
    const uint4& four = j < 4 ? low : high;
    return __uint_as_float(j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w);
  }
};

// Block scales are not negative: their 7 bits, at the low end of float16's exponent, are the scale times 2^(7 - 15),
// subnormals included, two at a time.
template <>
struct ColumnScales<E4M3Scale> {
  static constexpr int kBytes = 1;
  static constexpr float kUnit = power_of_two(7 - 15);
  uint32_t pairs[4];  // [j / 4 * 2 + j % 2] holds j and j + 2

  __device__ __forceinline__ void load(uint32_t shared) {
    const uint2 bytes = load_shared8(shared);
    pairs[0] = (bytes.x & 0x007F007Fu) << 7, pairs[1] = (bytes.x & 0x7F007F00u) >> 1;
    pairs[2] = (bytes.y & 0x007F007Fu) << 7, pairs[3] = (bytes.y & 0x7F007F00u) >> 1;
  }
  __device__ __forceinline__ float operator[](int j) const {
    return to_float<Half>(static_cast<uint16_t>(pairs[j / 4 * 2 + j % 2] >> (16 * (j / 2 % 2))));
  }
};

// The exponent of a float32. 0, which stands for 2^-127, is taken as zero: less than float32's least normal number.
template <>
struct ColumnScales<E8M0Scale> {
  static constexpr int kBytes = 1;
  static constexpr float kUnit = 1.0f;
  uint2 bytes;

  __device__ __forceinline__ void load(uint32_t shared) { bytes = load_shared8(shared); }
  __device__ __forceinline__ float operator[](int j) const {
    const uint32_t four = j < 4 ? bytes.x : bytes.y;
    return __uint_as_float((j % 4 == 3 ? four >> 1 : four << (23 - 8 * (j % 4))) & 0x7F800000u);
  }
};

// Kinds of zero points: one for all (0 where codes have a sign), or each group's own, as codes or as floats.
template <int kZero>
struct BakedZero {};
struct IntegerZeros {};
struct FloatZeros {};

// The zero points of one lane's columns g + 8 j.
template <class Zeros, class Code, class Scale>
struct ColumnZeros;

template <int kZero, class Code, class Scale>
struct ColumnZeros<BakedZero<kZero>, Code, Scale> {
  static constexpr bool kStored = false, kWhole = true;
  static constexpr float kBaked = kZero;
  static constexpr int kUnitBytes = 0;  // of 64 columns

  __device__ __forceinline__ void load(uint32_t, int) {}
  __device__ __forceinline__ float operator[](int) const { return kBaked; }
};

template <class Code, class Scale>
struct ColumnZeros<IntegerZeros, Code, Scale> {
  static constexpr bool kStored = true, kWhole = true;
  static constexpr float kBaked = 0.0f;
  static constexpr int kUnitBytes = 8 * Code::kBits;
  uint32_t words[Code::kBits / 4];

  __device__ __forceinline__ void load(uint32_t shared, int column) {
    if constexpr (Code::kBits == 4) {
      words[0] = load_shared4(shared + column * 4);
    } else {
      const uint2 both = load_shared8(shared + column * 8);
      words[0] = both.x, words[1] = both.y;
    }
  }
  // docs/formats.md, "Scales, zero points and bias": nibbles in the order 0, 4, 1, 5, ..., bytes in 0, 2, 1, 3.
  __device__ __forceinline__ float operator[](int j) const {
    if constexpr (Code::kBits == 4) return static_cast<float>(words[0] >> (4 * (j / 2 + 4 * (j % 2))) & 0xFu);
    return static_cast<float>(words[j / 4] >> (8 * (j % 4 / 2 + 2 * (j % 2))) & 0xFFu);
  }
};

template <class Code, class Scale>
struct ColumnZeros<FloatZeros, Code, Scale> {
  static constexpr bool kStored = true, kWhole = false;
  static constexpr float kBaked = 0.0f;
  static constexpr int kUnitBytes = 64 * ColumnScales<Scale>::kBytes;
  ColumnScales<Scale> zeros;

  __device__ __forceinline__ void load(uint32_t shared, int column) {
    zeros.load(shared + column * 8 * ColumnScales<Scale>::kBytes);
  }
  __device__ __forceinline__ float operator[](int j) const { return zeros[j]; }
};

}  // namespace jmm
