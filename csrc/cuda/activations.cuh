// The activations between the two products of a block: functions of float32 sums, one struct each.
//
// A gated activation takes gate and up of a column, another one the value alone (its second argument is not read).
#pragma once

#include "types.cuh"

namespace jmm {

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + __expf(-value)); }

struct Silu {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) { return gate * sigmoid(gate) * up; }
};

// 0.5 * (1 + tanh(y)) is sigmoid(2 y).
struct GeluTanh {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) {
    constexpr float kSqrt2OverPi = 0.7978845608f;
    return gate * sigmoid(2.0f * kSqrt2OverPi * (gate + 0.044715f * gate * gate * gate)) * up;
  }
};

// Parameters are the bit patterns of float32 values.
template <uint32_t kLimit, uint32_t kAlpha, uint32_t kBeta>
struct Swiglu {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) {
    const float limit = __uint_as_float(kLimit);
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit);
    return gate * sigmoid(__uint_as_float(kAlpha) * gate) * (up + __uint_as_float(kBeta));
  }
};

struct Relu2 {
  static constexpr bool kGated = false;
  __device__ __forceinline__ static float apply(float value, float) {
    value = fmaxf(value, 0.0f);
    return value * value;
  }
};

}  // namespace jmm
