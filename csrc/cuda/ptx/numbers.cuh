// PTX of arithmetic, of bits and of conversions, one function per instruction.
#pragma once

#include "types.cuh"

namespace jmm {

// Of the eight bytes of two words, those that the lower four nibbles name, of 3 bits each. (`__byte_perm` masks them
// first.)
__device__ __forceinline__ uint32_t chosen_bytes(uint32_t low, uint32_t high, uint32_t nibbles) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(nibbles));
  return bytes;
}

// (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The bits of a where mask has ones, those of b elsewhere. The compiler would rather clear bits of a or b beforehand,
// in an instruction more.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// The sum of four bytes and a number.
__device__ __forceinline__ uint32_t sum_of_bytes(uint32_t bytes, uint32_t sum) {
  asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(0x01010101));
  return sum;
}

// The larger number; NaN where one of them is NaN.
__device__ __forceinline__ float maximum_or_nan(float a, float b) {
  float larger;
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
#else
  larger = a != a || b != b ? a + b : a > b ? a : b;
#endif
  return larger;
}

// The largest of a warp's values.
__device__ __forceinline__ uint32_t maximum_of_warp(uint32_t value) {
  uint32_t most = value;
#if __CUDA_ARCH__ >= 800
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(value));
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(~0u, most, distance));
#endif
  return most;
}

// 2^value and 1 / value, off by a unit or two of the last place; numbers below 2^-126 are zero.
__device__ __forceinline__ float quick_power_of_two(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}
__device__ __forceinline__ float quick_reciprocal(float value) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(value));
  return quotient;
}

// a * b + c of both halves, rounded once.
template <class T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t multiply_add_pairs<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>  // sm_75 has no bfloat16, and no call gets there
__device__ __forceinline__ uint32_t multiply_add_pairs<BFloat>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

// a * b of both halves. (bfloat16 has a product of its own on sm_90 alone; less zero, the sum is the product.)
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  constexpr uint32_t kMinusZeros = 0x80008000u;
  return multiply_add_pairs<T>(a, b, kMinusZeros);
}

// Rounded to the 11 bits that a product of tf32 reads.
__device__ __forceinline__ float round_to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return value;
#endif
}

template <class T>
__device__ __forceinline__ float to_float(uint16_t bits);

template <>
__device__ __forceinline__ float to_float<Half>(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

template <>
__device__ __forceinline__ float to_float<BFloat>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Of the upper half of a pair: the conversion reads it there, which a shift before it hides from the compiler.
__device__ __forceinline__ float upper_half_to_float(uint32_t pair) {
  float f;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}" : "=f"(f) : "r"(pair));
  return f;
}

#if __CUDA_ARCH__ >= 890
constexpr bool kConvertsE4M3 = true;
#else
constexpr bool kConvertsE4M3 = false;
#endif

// The two lower e4m3 numbers of a word as halves, exactly. Of an architecture that converts them.
__device__ __forceinline__ uint32_t halves_of_e4m3_pair(uint32_t codes) {
  uint32_t values = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(values) : "r"(codes));
#endif
  return values;
}

// The two upper ones.
__device__ __forceinline__ uint32_t halves_of_upper_e4m3_pair(uint32_t codes) {
  uint32_t values = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}"
      : "=r"(values)
      : "r"(codes));
#endif
  return values;
}

// Two numbers as e4m3, the nearest ones, at most 448; the first in the low byte. Of an architecture that converts them.
__device__ __forceinline__ uint16_t e4m3_pair(float first, float second) {
  uint16_t codes = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
#endif
  return codes;
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ uint16_t from_float(float value);

template <>
__device__ __forceinline__ uint16_t from_float<Half>(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// A pair of it.
template <class T>
__device__ __forceinline__ uint32_t paired_from_float(float value);

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ uint16_t from_float<BFloat>(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t paired_from_float<BFloat>(float value) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t paired_from_float<Half>(float value) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
  return pair;
}
#endif

// The value, of which the compiler does not know how it was made: it shares it rather than make variants of it.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm("" : "+r"(value));
  return value;
}

// The address in registers, as it is here: no compiler makes it anew where it is used.
template <class T>
__device__ __forceinline__ T* opaque(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

}  // namespace jmm
