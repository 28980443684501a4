// The activations of an expert block by name: docs/formats.md, "The expert block".
#ifndef JAX_MARLIN_MOE_CPU_ACTIVATION_H_
#define JAX_MARLIN_MOE_CPU_ACTIVATION_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace jax_marlin_moe::cpu {

struct Activation {
  std::string_view name;
  bool gated;  // whether the first product has two halves [gate | up]; otherwise `up` is not read
  int parameters;
  // out[i] = act(gate[i], up[i]) in float32; out may be gate or up.
  void (*apply)(const float* gate, const float* up, int64_t count, const float* parameters, float* out);
};

// The activation of that name, or null.
const Activation* FindActivation(std::string_view name);

// Every name, for messages.
std::string ActivationNames();

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_ACTIVATION_H_
