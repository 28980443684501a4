// The activations between the two products of a block: functions of float32 sums, one struct each.
//
// A gated activation takes gate and up of a column, another one the value alone (its second argument is not read).
#pragma once

#include "types.cuh"

namespace jmm {

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + __expf(-value)); }

// Comparisons, unlike fminf and fmaxf, keep NaN.
__device__ __forceinline__ float at_most(float value, float limit) { return value > limit ? limit : value; }
__device__ __forceinline__ float clamp(float value, float limit) {
  return value < -limit ? -limit : at_most(value, limit);
}
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }

// Functions of one value.

struct Identity {
  __device__ __forceinline__ static float of(float value) { return value; }
};

struct Silu {
  __device__ __forceinline__ static float of(float value) { return value * sigmoid(value); }
};

// 1 + erf(y) is erfc(-y), which keeps its precision where erf is near -1.
struct Gelu {
  __device__ __forceinline__ static float of(float value) {
    constexpr float kSqrtHalf = 0.7071067812f;
    return 0.5f * value * erfcf(-kSqrtHalf * value);
  }
};

// 0.5 * (1 + tanh(y)) is sigmoid(2 y).
struct GeluTanh {
  __device__ __forceinline__ static float of(float value) {
    constexpr float kSqrt2OverPi = 0.7978845608f;
    return value * sigmoid(2.0f * kSqrt2OverPi * (value + 0.044715f * value * value * value));
  }
};

struct Relu {
  __device__ __forceinline__ static float of(float value) { return relu(value); }
};

struct Relu2 {
  __device__ __forceinline__ static float of(float value) { return relu(value) * relu(value); }
};

template <class Function>
struct Gated {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) { return Function::of(gate) * up; }
};

template <class Function>
struct Ungated {
  static constexpr bool kGated = false;
  __device__ __forceinline__ static float apply(float value, float) { return Function::of(value); }
};

// Parameters are the bit patterns of float32 values.

template <uint32_t kLimit, uint32_t kAlpha, uint32_t kBeta>
struct Swiglu {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) {
    const float limit = __uint_as_float(kLimit);
    gate = at_most(gate, limit);
    return gate * sigmoid(__uint_as_float(kAlpha) * gate) * (clamp(up, limit) + __uint_as_float(kBeta));
  }
};

template <uint32_t kLimit>
struct SwigluStep {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) {
    const float limit = __uint_as_float(kLimit);
    return at_most(Silu::of(gate), limit) * clamp(up, limit);
  }
};

template <uint32_t kBeta, uint32_t kLinearBeta>
struct Situ {
  static constexpr bool kGated = true;
  __device__ __forceinline__ static float apply(float gate, float up) {
    return bounded<kBeta>(gate) * sigmoid(gate) * bounded<kLinearBeta>(up);
  }

 private:
  template <uint32_t kBound>
  __device__ __forceinline__ static float bounded(float value) {
    constexpr uint32_t kInfinity = 0x7F800000u;
    if constexpr (kBound == kInfinity) return value;
    const float bound = __uint_as_float(kBound);
    return bound * tanhf(value / bound);
  }
};

}  // namespace jmm
