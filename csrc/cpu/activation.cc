// Activations and the table of their names. A new one is a function and a row.
#include "cpu/activation.h"

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

// gate * sigmoid(gate) * up
void Silu(const float* gate, const float* up, int64_t count, const float*, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + Exp(-gate[i])) * up[i];
}

// g * sigmoid(alpha * g) * (u + beta) of g = min(gate, limit), u = clamp(up, -limit, limit); NaN stays NaN.
void Swiglu(const float* gate, const float* up, int64_t count, const float* parameters, float* out) {
  const float limit = parameters[0], alpha = parameters[1], beta = parameters[2];
  for (int64_t i = 0; i < count; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
    out[i] = g * Sigmoid(alpha * g) * (u + beta);
  }
}

// gate / 2 * (1 + tanh(z)) * up of z = sqrt(2 / pi) * (gate + 0.044715 * gate^3), where 1 + tanh(z) = 2 * sigmoid(2z)
void GeluTanh(const float* gate, const float* up, int64_t count, const float*, float* out) {
  constexpr float kTwoRootTwoOverPi = 1.5957691216f;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gate[i];
    out[i] = g * Sigmoid(kTwoRootTwoOverPi * (g + 0.044715f * g * g * g)) * up[i];
  }
}

// max(gate, 0)^2; NaN stays NaN.
void Relu2(const float* gate, const float*, int64_t count, const float*, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = gate[i] < 0 ? 0 : gate[i];
    out[i] = g * g;
  }
}

constexpr Activation kActivations[] = {
    {"silu", true, 0, Silu},
    {"swiglu", true, 3, Swiglu},
    {"gelu_tanh", true, 0, GeluTanh},
    {"relu2", false, 0, Relu2},
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
