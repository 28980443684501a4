// Fixed-width integers, the 16-bit element types and the bits of their numbers.
//
// NVRTC compiles kernels with csrc/cuda as its only include path, so nothing of the standard library is at hand.
#pragma once

using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;

namespace jmm {

// Whether two types are the same.
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Elements of arrays. (NVRTC's own types need headers of the toolkit.)
struct Half {  // IEEE binary16
  uint16_t bits;
  static constexpr int kMantissaBits = 10, kExponentBias = 15;
};
struct BFloat {  // bfloat16
  uint16_t bits;
  static constexpr int kMantissaBits = 7, kExponentBias = 127;
};

// Rows that were quantised to 8 bits (quantize_rows.cuh); `Sum` is what their products accumulate in.
struct Fp8 {  // float8_e4m3fn
  unsigned char bits;
  using Sum = float;
};
struct E5M2TimesFp8 {};  // products of float8_e5m2 and float8_e4m3fn
struct Signed8 {         // -127 to 127
  signed char bits;
  using Sum = int32_t;
};
template <class T>
constexpr bool kIsByte = kSame<T, Fp8> || kSame<T, Signed8>;

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
