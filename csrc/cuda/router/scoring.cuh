// Scores of all experts from a token's logits, as jax_marlin_moe/routing.py has them.
//
// A warp has the logits of one token, each lane kCount of them; those of experts that do not exist are -infinity.
#pragma once

#include "types.cuh"

namespace jmm {

__device__ __forceinline__ float exact_sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// Not a number if any is.
__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(~0u, value, distance);
    value = value > other || value != value ? value : other;
  }
  return value;
}

struct SoftmaxScores {
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
  template <int kCount>
  __device__ __forceinline__ static void apply(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = exact_sigmoid(values[i]);
  }
};

struct SqrtSoftplusScores {
  template <int kCount>
  __device__ __forceinline__ static void apply(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float v = values[i];
      values[i] = sqrtf((v > 0.0f || v != v ? v : 0.0f) + log1pf(expf(-fabsf(v))));
    }
  }
};

struct IdentityScores {
  template <int kCount>
  __device__ __forceinline__ static void apply(float (&)[kCount]) {}
};

}  // namespace jmm
