// Numbers of the router's arrays: float32, or 16 bits.
#pragma once

#include "ptx/numbers.cuh"

namespace jmm {

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(Half value) { return to_float<Half>(value.bits); }
__device__ __forceinline__ float number(BFloat value) { return to_float<BFloat>(value.bits); }

// Both halves of a pair, as 32-bit floats. Exact, also in the 11 bits that mma_16x8x8_tf32 reads.
template <class T>
__device__ __forceinline__ uint32_t low_number(uint32_t pair) {
  return __float_as_uint(to_float<T>(static_cast<uint16_t>(pair)));
}
template <class T>
__device__ __forceinline__ uint32_t high_number(uint32_t pair) {
  return kSame<T, BFloat> ? pair & 0xFFFF0000u : __float_as_uint(to_float<T>(static_cast<uint16_t>(pair >> 16)));
}

}  // namespace jmm
