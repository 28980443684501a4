// How the input of the second product is quantised, by name: docs/formats.md, "Quantised intermediates".
#ifndef JAX_MARLIN_MOE_CPU_INTERMEDIATE_H_
#define JAX_MARLIN_MOE_CPU_INTERMEDIATE_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace jax_marlin_moe::cpu {

constexpr int kIntermediateBlock = 16;  // columns that may share a dynamic scale

struct IntermediateQuantizer {
  std::string_view name;
  // Replaces whole blocks by values in units of the scale, which 16-bit types hold exactly. A scale of zero makes
  // zeros.
  void (*apply)(float* values, int64_t count, float scale);
};

// The quantiser of that name, or null.
const IntermediateQuantizer* FindIntermediateQuantizer(std::string_view name);

// Every name, for messages.
std::string IntermediateQuantizerNames();

// What is not positive and finite counts as zero.
inline float UsableScale(float scale) {
  return scale > 0 && scale < std::numeric_limits<float>::infinity() ? scale : 0.0f;
}

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_INTERMEDIATE_H_
