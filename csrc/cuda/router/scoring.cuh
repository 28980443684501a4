// Scores of all experts from a token's logits, as jax_marlin_moe/routing.py has them.
//
// Most are a function of one logit. The softmax is of all: a warp has those of a token, each lane kCount of them, and
// -infinity in place of experts that do not exist.
#pragma once

#include "ptx/numbers.cuh"

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

// The number of which an order is.
__device__ __forceinline__ float number_of(uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// Not a number if any is.
__device__ __forceinline__ float largest_of_warp(float value) {
  const bool none = __any_sync(~0u, value != value);
  const uint32_t most = maximum_of_warp(order_of(value));
  return none ? __uint_as_float(0x7FC00000u) : number_of(most);
}

// Divides numbers from 0 to 1 by one from 1 to 1024, or by NaN. Quotients are correctly rounded (but for the last bit
// of subnormal ones), without the branch, one for each, in which a division asks for sizes.
struct Divisor {
  const float divisor;
  float inverse;

  __device__ __forceinline__ explicit Divisor(float d) : divisor(d), inverse(quick_reciprocal(d)) {
    inverse = fmaf(inverse, fmaf(-divisor, inverse, 1.0f), inverse);
  }
  __device__ __forceinline__ float divide(float value) const {
    const float about = value * inverse;
    return fmaf(fmaf(-divisor, about, value), inverse, about);
  }
};

struct SoftmaxScores {
  static constexpr bool kOfAll = true;

  // Times their sum, which is 1 or more.
  template <int kCount>
  __device__ __forceinline__ static void exponentiate(float (&values)[kCount]) {
    float most = values[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) most = most > values[i] || most != most ? most : values[i];
    most = largest_of_warp(most);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = expf(values[i] - most);
  }

  template <int kCount>
  __device__ __forceinline__ static void apply(float (&values)[kCount]) {
    exponentiate(values);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += values[i];
    sum = sum_of_warp(sum);
    const Divisor divisor(sum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = divisor.divide(values[i]);
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
