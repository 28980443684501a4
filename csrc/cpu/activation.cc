// Activations and the table of their names. A new one is a function and a row.
#include "cpu/activation.h"

#include <cmath>
#include <cstring>

namespace jax_marlin_moe::cpu {
namespace {

// e^x to 2 units in the last place, in arithmetic that compilers vectorise, unlike a call of std::exp.
// Below -87 it is e^-87, the last normal number; above 88.3 it is infinity; NaN stays NaN.
inline float Exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;           // n = 128, whose power is infinity
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits of the sum
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // 2^n: the shift drops all but n's low bits
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

// 1 - erf(x) within 2e-7 of itself: the Chebyshev fit of Numerical Recipes (section 6.2, erfcc).
inline float Erfc(float x) {
  const float z = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  const float tail = t * Exp(p * t - 1.26551223f - z * z);
  return x < 0 ? 2.0f - tail : tail;
}

// tanh(x): by its series near 0, where the quotient would lose digits.
inline float Tanh(float x) {
  const float power = Exp(-2.0f * (x < 0 ? -x : x));
  const float quotient = (1.0f - power) / (1.0f + power);
  const float far = x < 0 ? -quotient : quotient;
  const float q = x * x;
  const float near = x * (1.0f + q * (-1.0f / 3 + q * (2.0f / 15 + q * (-17.0f / 315 + q * (62.0f / 2835)))));
  return q < 0.0625f ? near : far;
}

inline float Minimum(float x, float limit) { return x > limit ? limit : x; }
inline float Clamp(float x, float limit) { return x < -limit ? -limit : Minimum(x, limit); }

// Functions of one value.

inline float Identity(float x) { return x; }

inline float Silu(float x) { return x / (1.0f + Exp(-x)); }

// x / 2 * (1 + erf(x / sqrt(2)))
inline float Gelu(float x) { return 0.5f * x * Erfc(-0.7071067812f * x); }

// x / 2 * (1 + tanh(z)) of z = sqrt(2 / pi) * (x + 0.044715 * x^3), where 1 + tanh(z) = 2 * sigmoid(2z)
inline float GeluTanh(float x) {
  constexpr float kTwoRootTwoOverPi = 1.5957691216f;
  return x * Sigmoid(kTwoRootTwoOverPi * (x + 0.044715f * x * x * x));
}

inline float Relu(float x) { return x < 0 ? 0 : x; }

inline float Relu2(float x) { return Relu(x) * Relu(x); }

template <float (*kFunction)(float)>
void Gated(const float* gate, const float* up, int64_t count, const float*, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = kFunction(gate[i]) * up[i];
}

template <float (*kFunction)(float)>
void Ungated(const float* value, const float*, int64_t count, const float*, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = kFunction(value[i]);
}

// g * sigmoid(alpha * g) * (u + beta) of g = min(gate, limit), u = clamp(up, -limit, limit); NaN stays NaN.
void Swiglu(const float* gate, const float* up, int64_t count, const float* parameters, float* out) {
  const float limit = parameters[0], alpha = parameters[1], beta = parameters[2];
  for (int64_t i = 0; i < count; ++i) {
    const float g = Minimum(gate[i], limit);
    out[i] = g * Sigmoid(alpha * g) * (Clamp(up[i], limit) + beta);
  }
}

// min(silu(gate), limit) * clamp(up, -limit, limit); NaN stays NaN.
void SwigluStep(const float* gate, const float* up, int64_t count, const float* parameters, float* out) {
  const float limit = parameters[0];
  for (int64_t i = 0; i < count; ++i) out[i] = Minimum(Silu(gate[i]), limit) * Clamp(up[i], limit);
}

// b * tanh(gate / b) * sigmoid(gate) * l * tanh(up / l) of b = beta, l = linear beta; x where a bound is infinite.
void Situ(const float* gate, const float* up, int64_t count, const float* parameters, float* out) {
  const float beta = parameters[0], linear_beta = parameters[1];
  const bool bounded = !std::isinf(beta), linear_bounded = !std::isinf(linear_beta);
  for (int64_t i = 0; i < count; ++i) {
    const float g = bounded ? beta * Tanh(gate[i] / beta) : gate[i];
    const float u = linear_bounded ? linear_beta * Tanh(up[i] / linear_beta) : up[i];
    out[i] = g * Sigmoid(gate[i]) * u;
  }
}

constexpr Activation kActivations[] = {
    {"none", true, 0, Gated<Identity>},
    {"identity", false, 0, Ungated<Identity>},
    {"silu", true, 0, Gated<Silu>},
    {"silu_ungated", false, 0, Ungated<Silu>},
    {"gelu", true, 0, Gated<Gelu>},
    {"gelu_ungated", false, 0, Ungated<Gelu>},
    {"gelu_tanh", true, 0, Gated<GeluTanh>},
    {"gelu_tanh_ungated", false, 0, Ungated<GeluTanh>},
    {"relu", true, 0, Gated<Relu>},
    {"relu_ungated", false, 0, Ungated<Relu>},
    {"relu2_gated", true, 0, Gated<Relu2>},
    {"relu2", false, 0, Ungated<Relu2>},
    {"swiglu", true, 3, Swiglu},
    {"swiglu_step", true, 1, SwigluStep},
    {"situ", true, 2, Situ},
};

}  // namespace

const Activation* FindActivation(std::string_view name) {
  for (const Activation& row : kActivations) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

std::string ActivationNames() {
  std::string names;
  for (const Activation& row : kActivations) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

}  // namespace jax_marlin_moe::cpu
