// The activations between the two products of a block: functions of float32 sums, one struct each.
//
// A gated activation takes gate and up of a column, another one the value alone (its second argument is not read). They
// are written for any type of numbers: of float, and of Dual, which has a derivative along (dual.cuh).
#pragma once

#include "dual.cuh"

namespace jmm {

// Functions of one value.

struct Identity {
  template <class Number>
  __device__ __forceinline__ static Number of(Number value) {
    return value;
  }
};

struct Silu {
  template <class Number>
  __device__ __forceinline__ static Number of(Number value) {
    return value * sigmoid(value);
  }
};

// 1 + erf(y) is erfc(-y), which keeps its precision where erf is near -1.
struct Gelu {
  template <class Number>
  __device__ __forceinline__ static Number of(Number value) {
    constexpr float kSqrtHalf = 0.7071067812f;
    return 0.5f * value * erfcf(-kSqrtHalf * value);
  }
};

// 0.5 * (1 + tanh(y)) is sigmoid(2 y).
struct GeluTanh {
  template <class Number>
  __device__ __forceinline__ static Number of(Number value) {
    constexpr float kSqrt2OverPi = 0.7978845608f;
    return value * sigmoid(2.0f * kSqrt2OverPi * (value + 0.044715f * value * value * value));
  }
};

struct Relu {
  template <class Number>
  __device__ __forceinline__ static Number of(Number value) {
    return relu(value);
  }
};

struct Relu2 {
  template <class Number>
  __device__ __forceinline__ static Number of(Number value) {
    return relu(value) * relu(value);
  }
};

template <class Function>
struct Gated {
  static constexpr bool kGated = true;
  template <class Number>
  __device__ __forceinline__ static Number apply(Number gate, Number up) {
    return Function::of(gate) * up;
  }
};

template <class Function>
struct Ungated {
  static constexpr bool kGated = false;
  template <class Number>
  __device__ __forceinline__ static Number apply(Number value, Number) {
    return Function::of(value);
  }
};

// Parameters are the bit patterns of float32 values.

template <uint32_t kLimit, uint32_t kAlpha, uint32_t kBeta>
struct Swiglu {
  static constexpr bool kGated = true;
  template <class Number>
  __device__ __forceinline__ static Number apply(Number gate, Number up) {
    const float limit = __uint_as_float(kLimit);
    gate = at_most(gate, limit);
    return gate * sigmoid(__uint_as_float(kAlpha) * gate) * (clamp(up, limit) + __uint_as_float(kBeta));
  }
};

template <uint32_t kLimit>
struct SwigluStep {
  static constexpr bool kGated = true;
  template <class Number>
  __device__ __forceinline__ static Number apply(Number gate, Number up) {
    const float limit = __uint_as_float(kLimit);
    return at_most(Silu::of(gate), limit) * clamp(up, limit);
  }
};

template <uint32_t kBeta, uint32_t kLinearBeta>
struct Situ {
  static constexpr bool kGated = true;
  template <class Number>
  __device__ __forceinline__ static Number apply(Number gate, Number up) {
    return bounded<kBeta>(gate) * sigmoid(gate) * bounded<kLinearBeta>(up);
  }

 private:
  template <uint32_t kBound, class Number>
  __device__ __forceinline__ static Number bounded(Number value) {
    constexpr uint32_t kInfinity = 0x7F800000u;
    if constexpr (kBound == kInfinity) return value;
    const float bound = __uint_as_float(kBound);
    return bound * tanhf(value / bound);
  }
};

// The same of two columns, off by a few units of the last place, for results of which 8 bits are kept.
template <class Activation>
struct Quick {
  __device__ __forceinline__ static float2 apply(float2 gate, float2 up) {
    return {Activation::apply(gate.x, up.x), Activation::apply(gate.y, up.y)};
  }
};
// One reciprocal for both: the special functions are what bounds them. Exponents are such that no product overflows.
template <>
struct Quick<Gated<Silu>> {
  __device__ __forceinline__ static float2 apply(float2 gate, float2 up) {
    const float first = 1.0f + __expf(fminf(-gate.x, 43.0f)), second = 1.0f + __expf(fminf(-gate.y, 43.0f));
    const float inverse = __fdividef(1.0f, first * second);
    return {gate.x * up.x * (inverse * second), gate.y * up.y * (inverse * first)};
  }
};

}  // namespace jmm
