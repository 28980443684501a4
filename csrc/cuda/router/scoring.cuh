// Scores of all experts from a token's logits, as jax_marlin_moe/routing.py has them.
//
// Most are a function of one logit. The softmax is of all: a warp has those of a token, each lane kCount of them, and
// -infinity in place of experts that do not exist.
#pragma once

#include "ptx/ptx.cuh"

namespace jmm {

__device__ __forceinline__ float exact_sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// Over the lanes of each kLanes neighbours, a power of two; others have 0, or sums of their own.
template <int kLanes = 32>
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// Larger for larger numbers, and never 0.
__device__ __forceinline__ uint32_t order_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return max(bits >> 31 ? ~bits : bits | 0x80000000u, 1u);
}

// Not a number if any is.
__device__ __forceinline__ float largest_of_warp(float value) {
  const bool none = __any_sync(~0u, value != value);
  const uint32_t most = maximum_of_warp(order_of(value));
  return __uint_as_float(none ? 0x7FC00000u : most >> 31 ? most & 0x7FFFFFFFu : ~most);
}

struct SoftmaxScores {
  static constexpr bool kOfAll = true;

  template <int kCount>
  __device__ __forceinline__ static void apply(float (&values)[kCount]) {
    float most = values[0], sum = 0.0f;
#pragma unroll
    for (int i = 1; i < kCount; ++i) most = most > values[i] || most != most ? most : values[i];
    most = largest_of_warp(most);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += values[i] = expf(values[i] - most);
    sum = sum_of_warp(sum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] /= sum;
  }
};

struct SigmoidScores {
  static constexpr bool kOfAll = false;

  __device__ __forceinline__ static float of(float logit) { return exact_sigmoid(logit); }
};

struct SqrtSoftplusScores {
  static constexpr bool kOfAll = false;

  __device__ __forceinline__ static float of(float logit) {
    return sqrtf((logit > 0.0f || logit != logit ? logit : 0.0f) + log1pf(expf(-fabsf(logit))));
  }
};

struct IdentityScores {
  static constexpr bool kOfAll = false;

  __device__ __forceinline__ static float of(float logit) { return logit; }
};

}  // namespace jmm
