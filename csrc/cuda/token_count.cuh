// How many tokens a call has: what its kernels were compiled for, or, in a program for a range of numbers, a value that
// the host passes, between one and that.
#pragma once

#include "types.cuh"

namespace jmm {

template <bool kCounted>
struct TokenCount {
  static constexpr bool kIsConstant = true;
  __device__ __forceinline__ static constexpr int of(int most) { return most; }
};
template <>
struct TokenCount<true> {
  static constexpr bool kIsConstant = false;
  int64_t tokens;

  __device__ __forceinline__ TokenCount(int64_t t) : tokens(t) {}
  __device__ __forceinline__ int of(int most) const { return tokens < most ? static_cast<int>(tokens) : most; }
};

}  // namespace jmm
