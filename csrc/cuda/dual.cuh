// Numbers with a derivative along: what a function of float computes, it computes of them with its derivative. And the
// functions that activations are made of, of both.
#pragma once

#include "ptx/numbers.cuh"

namespace jmm {

using ::erfcf;
using ::tanhf;

// A value, and how fast it changes along some direction.
struct Dual {
  float value, slope;
};

__device__ __forceinline__ Dual operator*(Dual a, Dual b) {
  return {a.value * b.value, a.slope * b.value + a.value * b.slope};
}
__device__ __forceinline__ Dual operator*(float a, Dual b) { return {a * b.value, a * b.slope}; }
__device__ __forceinline__ Dual operator/(Dual a, float b) { return {a.value / b, a.slope / b}; }
__device__ __forceinline__ Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
__device__ __forceinline__ Dual operator+(Dual a, float b) { return {a.value + b, a.slope}; }

// Off by a few units of its last place, without a branch, and zero below 2^-126.
__device__ __forceinline__ float sigmoid(float value) {
  constexpr float kLog2E = 1.4426950409f;
  return quick_reciprocal(1.0f + quick_power_of_two(value * -kLog2E));
}
__device__ __forceinline__ Dual sigmoid(Dual x) {
  const float value = sigmoid(x.value);
  return {value, x.slope * (value * (1.0f - value))};
}

// Comparisons, unlike fminf and fmaxf, keep NaN. At a limit, where there are two derivatives, JAX has their mean.
__device__ __forceinline__ float at_most(float value, float limit) { return value > limit ? limit : value; }
__device__ __forceinline__ Dual at_most(Dual x, float limit) {
  if (x.value > limit) return {limit, 0.0f};
  return {x.value, x.value == limit ? 0.5f * x.slope : x.slope};
}
__device__ __forceinline__ float clamp(float value, float limit) {
  return value < -limit ? -limit : at_most(value, limit);
}
__device__ __forceinline__ Dual clamp(Dual x, float limit) {
  if (x.value < -limit) return {-limit, 0.0f};
  if (x.value == -limit) return {-limit, 0.5f * x.slope};
  return at_most(x, limit);
}

// At 0 the derivative is 0, as JAX has it.
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }
__device__ __forceinline__ Dual relu(Dual x) { return {relu(x.value), x.value > 0.0f ? x.slope : 0.0f * x.value}; }

__device__ __forceinline__ Dual erfcf(Dual x) {
  constexpr float kTwoOverRootPi = 1.1283791671f;
  return {::erfcf(x.value), -kTwoOverRootPi * __expf(-x.value * x.value) * x.slope};
}
__device__ __forceinline__ Dual tanhf(Dual x) {
  const float value = ::tanhf(x.value);
  return {value, (1.0f - value * value) * x.slope};
}

}  // namespace jmm
